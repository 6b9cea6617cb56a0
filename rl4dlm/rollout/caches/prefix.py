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
from rl4dlm.rollout.caches.policy import Now, PeriodicPolicy, Plan, check_period, register


@register
@dataclass(frozen=True)
class PrefixCache(PeriodicPolicy):
    """Refreshes at block entry, then reuses everything before the block.

    Args:
        refresh_blocks, refresh_steps: as in `PeriodicPolicy`; rows that enter a block between two refreshes feed the
            block before it and all that follows.
        suffix_window: slots behind the block that are fed; what lies behind them is read from the store. None: all.

    Raises:
        ValueError: a setting that is no such number.
    """

    suffix_window: int | None = None

    name: ClassVar[str] = "prefix"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_period(self, "suffix_window", low=0)

    def plan(self, now: Now) -> Plan:
        first = self.first(now)
        if self.suffix_window is None:
            return Plan(first)
        last = (now.stop + self.suffix_window).clamp(max=now.columns)
        return Plan(first, torch.where(first < 0, now.columns, last))
