"""Fast-dLLM's dual cache (arXiv 2505.22618, section 3.1), and a leaner relative of it.

`dual`: the first step of a block is a full forward that also fills the store; the block's later steps feed the block
alone, against the stored keys and values of everything else: what precedes it, and the masked slots that follow. Both
are stale as soon as a token is committed, so with full attention logits are approximate. Positions fed per token are
`(S + (s - 1) b) / b` for s steps per block of b slots in rows of S columns.

`dual_masked`: of the block, too, only what must be fed is: its masked slots, and those that were written in the step
before, whose keys would else be a mask token's (the delay of dKV-Cache, arXiv 2505.15781, inside the block).

Where attention is left to right `dual` is what `prefix` is, the exact block cache; `dual_masked` is not, since tokens
of a block see one another.

Differences from Fast-dLLM's released code: rows of any number, prompts of different length and rows in different blocks
share a batch (there a batch larger than one fails); keys are stored rotated and written in place; a block that is
complete after its first step costs no second one; where logits are shifted, the slot before the block is fed too, so
that the block's first slot is predicted at every step (there it is always written from the first one). The refresh
periods are ours: rows that enter a block between two refreshes feed that block and the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches.policy import Now, PeriodicPolicy, Plan, register


@register
@dataclass(frozen=True)
class DualCache(PeriodicPolicy):
    """Refreshes at block entry, then reuses everything around the block; settings as in `PeriodicPolicy`."""

    name: ClassVar[str] = "dual"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)

    def plan(self, now: Now) -> Plan:
        first = self.first(now)
        return Plan(first, torch.where(first < 0, now.columns, now.stop))


@register
@dataclass(frozen=True)
class DualMaskedCache(DualCache):
    """Refreshes at block entry, then feeds the block's masked slots and those just written."""

    name: ClassVar[str] = "dual_masked"
    exact_for: ClassVar[frozenset[str]] = frozenset()
    tracks: ClassVar[bool] = True

    @property
    def feeds_again(self) -> bool:
        return False

    def plan(self, now: Now) -> Plan:
        plan = super().plan(now)
        return Plan(plan.first, plan.last, now.masked | now.changed)
