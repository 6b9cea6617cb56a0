"""Several blocks that are open at once: when the next one is opened, and how far each is decoded.

Shared by `d2f` and `multi_block`. Owns nothing of what is written in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.parts import BlockState, Step


@dataclass(frozen=True)
class OpenBlocks:
    """Opens the next block, one per step at most, once so much of the last open one is written.

    Args:
        block_length: of a whole block.
        threshold: the share of its slots, 0 to 1.
        until_end: opens none in rows in which an end of sequence is written.
    """

    block_length: int
    threshold: float
    until_end: bool

    def __call__(self, rows: BlockState) -> Tensor:
        slots = torch.arange(rows.masked.shape[1], device=rows.masked.device)
        # Blocks follow the first one, whose end lies on the grid unless it is that of the row.
        behind = rows.reach - rows.stop
        last = rows.stop + (behind - 1).div(self.block_length, rounding_mode="floor").clamp(min=0) * self.block_length
        last = torch.where(behind > 0, last, rows.start)
        inside = (slots >= last[:, None]) & (slots < rows.reach[:, None])
        decoded = 1 - (inside & rows.masked).sum(-1).double() / inside.sum(-1).clamp(min=1)
        opens = decoded >= self.threshold
        if self.until_end:
            opens &= ~rows.ended
        grown = torch.where(opens, rows.reach + self.block_length, rows.reach)
        return torch.where(rows.reach < rows.stop, rows.stop, grown)


def blocks_of(step: Step, block_length: int) -> Tensor:
    """The number of each slot's block, 0 for the active one; long `[R, W]`, negative before it."""
    behind = (step.offsets - step.stop[:, None]).div(block_length, rounding_mode="floor") + 1
    return torch.where(step.inside, 0, torch.where(step.offsets < step.start[:, None], -1, behind))


def best_of_each(scores: Tensor, eligible: Tensor, blocks: Tensor) -> Tensor:
    """The best eligible slot of each block, the lower one among equals; none where all scores are -inf: bool `[R, W]`.

    Args:
        scores: `[R, W]`. eligible: bool `[R, W]`. blocks: long `[R, W]`, of `blocks_of`.
    """
    best = torch.zeros_like(eligible)
    for number in range(int(blocks.max()) + 1):
        here = eligible & (blocks == number) & (scores > -torch.inf)
        place = scores.masked_fill(~here, -torch.inf).argmax(-1, keepdim=True)
        best |= torch.zeros_like(best).scatter(-1, place, here.any(-1, keepdim=True))
    return best


def in_blocks_of(slots: Tensor, blocks: Tensor) -> Tensor:
    """All slots of open blocks that have one of `slots`: bool `[R, W]`."""
    found = torch.zeros_like(slots)
    for number in range(int(blocks.max()) + 1):
        here = blocks == number
        found |= here & (slots & here).any(-1, keepdim=True)
    return found


def decoded_before(step: Step, blocks: Tensor) -> Tensor:
    """How much of the block before its own is written, for each slot of an open block: float64 `[R, W]` in 0 to 1.

    What lies before the active block is complete.
    """
    before = torch.ones(step.masked.shape, dtype=torch.float64, device=step.masked.device)
    for number in range(int(blocks.max())):
        here = blocks == number
        share = 1 - (here & step.masked).sum(-1).double() / here.sum(-1).clamp(min=1)
        before = torch.where(blocks == number + 1, share[:, None], before)
    return before
