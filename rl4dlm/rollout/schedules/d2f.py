"""Discrete diffusion forcing (D2F, Wang et al., arXiv 2508.09192): a pipeline of blocks that are denoised together.

The model sees blocks from left to right, so that a block can be denoised while those before it are unfinished. The next
block is opened when a share of the last open one is written (`add_threshold`), one per step. Every step writes, in all
open blocks, the candidates whose probability exceeds `threshold`; a block whose predecessor is decoded far enough
(`active_threshold`) writes its best candidate if none does.

With the `prefix` cache a block that is complete, as are all before it, is fed once more, together with the open ones
behind it, and then stays in the store: exact, because nothing in it sees what follows.

Differences from the released code (`eval_llada.py`): any number of rows; slots that were given; the mask token is no
candidate; at temperatures above 0 confidences are the untempered probabilities. As there, no block is opened ahead once
an end of sequence is written; `stop_at_eos="block"` then finishes the open ones, as the released code does, `True` what
comes before the end, and without a stop the rest follows block by block. Recorded results of the released code are
reproduced, forwards included. What is drawn depends on unfinished blocks: log-probabilities computed with finished ones
before a block (two copies of the sequence, as trainers score models with blocks) are those of another distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.open_blocks import (
    OpenBlocks,
    best_of_each,
    blocks_of,
    decoded_before,
    in_blocks_of,
)
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class D2FArguments:
    """Settings of `d2f`.

    Args:
        threshold: candidates whose probability exceeds it are committed.
        add_threshold: share of the last open block that is written when the next one is opened, above 0 to 1.
        active_threshold: share of the block before at which a block commits one token at least, 0 to 1.
    """

    threshold: float = 0.9
    add_threshold: float = 0.1
    active_threshold: float = 0.95

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)
        check_number(self, "add_threshold", 0, 1)
        check_number(self, "active_threshold", 0, 1)


@register("d2f", D2FArguments, takes_steps=False)
def d2f(arguments: D2FArguments, config: Any) -> Schedule:
    """Commits what is sure in all open blocks, and at least one token where the block before is far enough."""
    blocks = fixed_blocks(config)

    def commit(step: Step, scores: Tensor) -> Tensor:
        sure = step.eligible & (scores > arguments.threshold)
        numbers = blocks_of(step, blocks.block_length)
        active = step.eligible & (decoded_before(step, numbers) >= arguments.active_threshold)
        return sure | (best_of_each(scores, active, numbers) & ~in_blocks_of(sure, numbers))

    reach = OpenBlocks(blocks.block_length, arguments.add_threshold, until_end=True)
    return Schedule(blocks, probability, commit, reach=reach, ahead=True)
