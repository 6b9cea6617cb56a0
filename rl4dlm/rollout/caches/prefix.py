"""Fast-dLLM's prefix cache (arXiv 2505.22618, section 3.1).

The first step of a block is a full forward that also fills the store; the block's later steps feed the block and what
follows it, against the stored keys and values of what precedes it. With full attention those are stale as soon as a
token is committed, so logits are approximate.

Where attention is left to right the same policy is the exact block cache of block diffusion: the first step of a block
also feeds the block before it, now finished, whose keys are then final; later steps feed the block alone. The commit
forward that reference samplers make after each block is thus part of the next block's first step.

Differences from Fast-dLLM's released code: keys are stored rotated and written in place; prompts of different length
and rows in different blocks share a batch; a block that is complete after its first step costs no second one. The
refresh periods and the window are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, check_period, refresh_due, register


@register
@dataclass(frozen=True)
class PrefixCache(CachePolicy):
    """Refreshes at block entry, then reuses everything before the block.

    Args:
        refresh_blocks: blocks from one refresh to the next; rows that enter a block in between feed the block before
            it and all that follows.
        refresh_steps: steps within a block from one refresh to the next, besides those at entry; None: none.
        suffix_window: slots behind the block that are fed; what lies behind them is read from the store. None: all.

    Raises:
        ValueError: a setting that is no such number.
    """

    refresh_blocks: int = 1
    refresh_steps: int | None = None
    suffix_window: int | None = None

    name: ClassVar[str] = "prefix"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_period(self, "refresh_blocks", "refresh_steps")
        check_period(self, "suffix_window", low=0)

    @property
    def feeds_again(self) -> bool:
        return self.refresh_steps is None

    def plan(self, now: Now) -> Plan:
        first = torch.where(now.block_step == 0, now.before, now.start)
        first = first.masked_fill(refresh_due(now, self.refresh_blocks, self.refresh_steps), -1)
        if self.suffix_window is None:
            return Plan(first)
        last = (now.stop + self.suffix_window).clamp(max=now.columns)
        return Plan(first, torch.where(first < 0, now.columns, last))
