"""dInfer's refreshed vicinity (Ma et al., arXiv 2510.08666): what lies next to the block is fed with it.

Staleness is largest next to the block, so each step feeds the block with a window before and behind it, and everything
else is read from the store. The first step of a block is a full forward, and so are a row's first steps, while its
canvas says little. No window is `dual`; a window without bounds is `none`. Positions fed per step are `before + b +
after`, less where the row ends.

Where attention is left to right what lies behind the block is not seen, and what is fed before it is stored as it was:
the same as `prefix`, the exact block cache.

Differences from the released code: a step of the warm-up fills the store, so that none follows it to do so; the first
step of every block is a refresh, the first block's included; a refresh is one forward of one step (there a step that
refreshes makes a second, cached forward at once); refresh periods count a block's steps (there a row's iterations);
keys of the window are stored, which makes no difference before the next refresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, check_count, check_period, refresh_due, register


@register
@dataclass(frozen=True)
class VicinityCache(CachePolicy):
    """Refreshes at block entry, then feeds the block and what lies next to it.

    Args:
        before: columns before the block that are fed with it; None: all.
        after: columns behind the block that are fed with it; None: all.
        warmup_steps: steps of a row, from its first, that are full forwards.
        refresh_steps: steps within a block from one refresh to the next; None: only at entry.

    Raises:
        ValueError: a setting that is no such number.
    """

    before: int | None = 16
    after: int | None = 16
    warmup_steps: int = 4
    refresh_steps: int | None = None

    name: ClassVar[str] = "vicinity"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)

    def __post_init__(self) -> None:
        check_period(self, "refresh_steps")
        check_period(self, "before", "after", low=0)
        check_count(self, "warmup_steps", 0)

    def plan(self, now: Now) -> Plan:
        due = refresh_due(now, 1, self.refresh_steps) | (now.total_step < self.warmup_steps)
        first = torch.zeros_like(now.start) if self.before is None else (now.start - self.before).clamp(min=0)
        last = torch.full_like(first, now.columns) if self.after is None else now.stop + self.after
        return Plan(first.masked_fill(due, -1), last.clamp(max=now.columns).masked_fill(due, now.columns))
