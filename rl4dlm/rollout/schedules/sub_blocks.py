"""Fast-dLLM v2 (Wu et al., arXiv 2509.26328): sub-blocks of a block, one after another, by a confidence threshold.

The model denoises a block at a time and is given it whole, masks included; what is written lies in the first
unfinished sub-block: every candidate whose probability exceeds the threshold, and always the best one. Models of this
kind predict the next token (`logit_shift=1`). The first token of a block is therefore that of a causal model: the
finished block before it predicts it, whatever the block holds, so that it is written alone in the block's first step,
which also stores the keys and values of the block before (`first_alone`). A block in which the prompt ends has no such
token.

Differences from the released code: any number of rows, each at its own place (there the rows of a batch share their
steps, and prompts are padded with mask tokens, which are decoded); the first token of a block is drawn like any other
(there it is the most probable one at any temperature), and so has a log-probability; no token is predicted behind the
last block, and no forward is made to store only; the mask token is no candidate. A prompt of exactly one block is read
(there it is not). Recorded results of the released code are reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count, check_flag, check_number
from rl4dlm.rollout.schedules.dream import candidate_probability, certainty
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import BlockState, Schedule, Step
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class SubBlocksArguments:
    """Settings of `sub_blocks`.

    Args:
        sub_block_length: of a sub-block; the last one of a block is shorter where it does not divide the block.
        threshold: candidates whose probability, tempered and filtered, exceeds it are committed.
        first_alone: whether the first token of a block is written alone in its first step, for models that predict the
            next token. Without a logit shift a block gives its own first token, and there is nothing to wait for.
    """

    sub_block_length: int = 8
    threshold: float = 0.9
    first_alone: bool = True

    def __post_init__(self) -> None:
        check_count(self, "sub_block_length", 1)
        check_number(self, "threshold", 0)
        check_flag(self, "first_alone")


@register("sub_blocks", SubBlocksArguments, takes_steps=False)
def sub_blocks(arguments: SubBlocksArguments, config: Any) -> Schedule:
    """Commits what is sure in the first unfinished sub-block."""

    def reach(rows: BlockState) -> Tensor:
        slots = torch.arange(rows.masked.shape[1], device=rows.masked.device)
        begin = torch.where(rows.start > 0, rows.start, -rows.offset)  # of the grid; negative in the prompt
        first = (rows.masked & (slots >= rows.start[:, None])).long().argmax(-1)
        length = arguments.sub_block_length
        end = begin + ((first - begin).div(length, rounding_mode="floor") + 1) * length
        alone = (rows.step == 0) & (first == begin)
        end = torch.where(alone, first + 1, end) if arguments.first_alone else end
        return torch.minimum(end, rows.stop)

    def commit(step: Step, scores: Tensor) -> Tensor:
        return scores > arguments.threshold

    reads = {"certainty": candidate_probability}
    return Schedule(fixed_blocks(config), certainty, commit, reach=reach, reads=reads)
