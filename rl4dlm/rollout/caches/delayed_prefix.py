"""d3LLM's delayed prefix cache (Qian et al., arXiv 2601.07568): finished blocks are kept once they have settled.

Keys of a block that has just been finished are poor, because most of what they were computed from was masked. So a
finished block is fed for some steps more, each of them a full forward that also refreshes everything that is kept, and
is kept from the step after these. Every other step feeds what is not kept: the unfinished blocks and all that follows.
The prompt waits like a block that was finished a step before the first.

Where attention is left to right nothing that is kept depends on what is written later: the same as `prefix`, the exact
block cache.

Differences from the released code: rows of any number, each with its own blocks; where two blocks wait at once, the
keys that a full forward replaces are those of everything before the first of them (there of what precedes the last one,
which is then attended to twice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, check_count, check_period, register

FINISHED, KEPT = "finished", "kept"


@register
@dataclass(frozen=True)
class DelayedPrefixCache(CachePolicy):
    """Keeps what precedes the active block, some steps after it was finished.

    Args:
        delay: full forwards from a block's end to the step that keeps it.
        refresh_steps: steps of a row from one full forward to the next, unless a block is kept at that step; None:
            only while blocks wait.

    Raises:
        ValueError: a setting that is no such number.
    """

    delay: int = 1
    refresh_steps: int | None = None

    name: ClassVar[str] = "delayed_prefix"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self, "delay", 0)
        check_period(self, "refresh_steps")

    def plan(self, now: Now) -> Plan:
        step = (now.total_step + 1)[:, None]  # so that 0 says "not yet"
        slots = now.memory.slots
        blank = torch.zeros_like(now.open)
        finished, kept = slots.get(FINISHED, blank.long()), slots.get(KEPT, blank)
        offsets = now.column[now.width :] - now.width
        complete = offsets < (now.start - now.width)[:, None]
        finished = torch.where(complete & (finished == 0), step, finished)
        settled = complete & ~kept & (step - finished >= self.delay)
        waits = (complete & ~kept).any(-1) & ~settled.any(-1)
        first = torch.where(settled.any(-1), torch.minimum(now.before, now.width + kept.sum(-1)), now.start)
        slots[FINISHED], slots[KEPT] = finished, kept | settled
        full = waits | (now.refreshed < 0) | (now.total_step < self.delay)
        if self.refresh_steps is not None:
            full = full | (~settled.any(-1) & (step[:, 0] % self.refresh_steps == 0))
        return Plan(first.masked_fill(full, -1))
