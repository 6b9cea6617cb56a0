"""AdaBlock: blocks that end where a sentence or a line does (Lu et al., arXiv 2509.26432).

Tokens are written by a confidence threshold, block by block. How long a block is follows from its first forward: among
the next slots, a quarter of the canvas, the most confident candidate that is a delimiter ends the block if it is
confident enough; else the block has its default length. The same forward then writes the block's first tokens.

Differences from the released code: any number of rows; slots that were given are no delimiters, and blocks are counted
from their first open slot on; the mask token is no candidate; rows may stop early at an end-of-sequence token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.parts import BlockStart, Schedule, Step, above, probability, top
from rl4dlm.rollout.schedules.registry import register

LOOKAHEAD = 0.25
"""How far ahead delimiters are looked for, as a part of the canvas."""


@dataclass(frozen=True)
class AdaBlockArguments:
    """Settings of `adablock`.

    Args:
        delimiter_ids: tokens that may end a block, such as those with a line break (LLaDA: 198); without any, all
            blocks have the default length.
        delimiter_threshold: a delimiter ends a block when its probability reaches it; the paper uses 0.3 for LLaDA and
            0.5 for Dream.
        default_block: length of a block that no delimiter ends.
        threshold: a candidate is committed when its probability reaches it.
    """

    delimiter_ids: tuple[int, ...] = ()
    delimiter_threshold: float = 0.3
    default_block: int = 32
    threshold: float = 0.9

    def __post_init__(self) -> None:
        ids: Any = self.delimiter_ids
        if not isinstance(ids, tuple | list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError(f"delimiter_ids={ids!r} is not allowed; it must be a list of token ids, from 0 on")
        object.__setattr__(self, "delimiter_ids", tuple(ids))
        check_count(self, "default_block", 1)
        check_number(self, "delimiter_threshold", 0)
        check_number(self, "threshold", 0)


@register("adablock", AdaBlockArguments, takes_steps=False)
def adablock(arguments: AdaBlockArguments, config: Any) -> Schedule:
    """Commits every candidate of a block that ends with a delimiter whose probability reaches the threshold."""
    refuse_block_length(config, "default_block")
    return Schedule(
        DelimiterBlocks(
            default=arguments.default_block,
            lookahead=math.floor(LOOKAHEAD * config.canvas_length),
            delimiter_ids=arguments.delimiter_ids,
            threshold=arguments.delimiter_threshold,
        ),
        probability,
        above(arguments.threshold),
        memoryless=True,
    )


@dataclass(frozen=True)
class DelimiterBlocks:
    """Blocks that end with a confident delimiter, or have a default length.

    Args:
        default: length without a delimiter. lookahead: slots that a delimiter is looked for in.
        delimiter_ids: tokens that may end a block. threshold: probability that the one that does must reach.
    """

    default: int
    lookahead: int
    delimiter_ids: tuple[int, ...]
    threshold: float
    on_grid: bool = False

    def end(self, rows: BlockStart) -> Tensor:
        """The furthest that the block can reach."""
        return torch.minimum(first_open(rows.masked, rows.start) + max(self.default, self.lookahead), rows.length)

    def settle(self, step: Step) -> Tensor:
        start = first_open(step.eligible, step.start)
        near = step.eligible & (step.offsets < (start + self.lookahead)[:, None])
        delimiters = torch.tensor(self.delimiter_ids, dtype=torch.long, device=step.tokens.device)
        found = near & torch.isin(step.drawn.token, delimiters) & (step.drawn.confidence >= self.threshold)
        best = top(step.drawn.confidence, found, torch.ones_like(start)).long().argmax(-1)
        default = torch.minimum(start + self.default, step.length)
        return torch.where(found.any(-1), best + 1, default)


def first_open(slots: Tensor, start: Tensor) -> Tensor:
    """The first slot of each row that is True, `start` where none is: long `[R]` from bool `[R, W]` and long `[R]`."""
    return torch.where(slots.any(-1), slots.long().argmax(-1), start)


def refuse_block_length(config: Any, setting: str) -> None:
    """For schedules with blocks of their own, which need not divide the canvas. Raises ValueError if it is set."""
    if config.block_length is not None:
        raise ValueError(
            f"block_length={config.block_length} has no meaning for schedule={config.schedule!r}, whose blocks are its "
            f"own (so that models whose attention has blocks cannot be decoded with it); leave it None and set "
            f"{setting} in schedule_args"
        )
