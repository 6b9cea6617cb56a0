"""d3LLM's multi-block decoding (Qian et al., arXiv 2601.07568): several open blocks of a model with full attention.

The next block is opened when a share of the last open one is written (`add_threshold`), one per step. Every step writes
the candidates of all open blocks whose entropy is at most `entropy_threshold`, always the one of lowest entropy, and
the lowest of the first unfinished block if nothing else in it is written.

Differences from the released code (`generate_multi_block`): any number of rows; slots that were given; the mask token
is no candidate. There an early stop writes ends of sequence behind the first one at once, so that the model sees them;
here what follows an end is decoded as anything else until all before it is written. The released code gives a block its
own token once the block before it is decoded far enough (`decoded_token_threshold`), but looks at the first unfinished
block only, whose predecessor is complete, so that the setting has no effect; there is none here. Recorded results of
the released code are reproduced, but for early stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.entropy_bound import lowest_entropy
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.open_blocks import OpenBlocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, top
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class MultiBlockArguments:
    """Settings of `multi_block`.

    Args:
        entropy_threshold: candidates whose entropy in nats is at most this are committed.
        add_threshold: share of the last open block that is written when the next one is opened, above 0 to 1.
    """

    entropy_threshold: float = 0.4
    add_threshold: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "entropy_threshold", 0)
        check_number(self, "add_threshold", 0, 1)


@register("multi_block", MultiBlockArguments, takes_steps=False)
def multi_block(arguments: MultiBlockArguments, config: Any) -> Schedule:
    """Commits what has little entropy in all open blocks, and something of the first at every step."""
    blocks = fixed_blocks(config)

    def commit(step: Step, scores: Tensor) -> Tensor:
        one = torch.ones_like(step.block)
        chosen = step.eligible & (scores >= -arguments.entropy_threshold)
        chosen |= top(scores, step.eligible, one)
        first = step.eligible & step.inside & (scores > -torch.inf)  # tokens may be deferred
        chosen |= top(scores, first, one) & ~(chosen & first).any(-1, keepdim=True)
        return chosen

    reach = OpenBlocks(blocks.block_length, arguments.add_threshold, until_end=False)
    return Schedule(blocks, lowest_entropy, commit, reach=reach, ahead=True, reads_entropy=True)
