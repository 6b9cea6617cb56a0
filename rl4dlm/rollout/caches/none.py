"""No cache: every step is a full forward, exact for every attention kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.models.spec import ATTENTION_KINDS
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, register


@register
@dataclass(frozen=True)
class NoCache(CachePolicy):
    """Feeds the whole row at every step."""

    name: ClassVar[str] = "none"
    uses_store: ClassVar[bool] = False
    exact_for: ClassVar[frozenset[str]] = frozenset(ATTENTION_KINDS)

    @property
    def feeds_again(self) -> bool:
        return True

    def plan(self, now: Now) -> Plan:
        return Plan(torch.full_like(now.start, -1))
