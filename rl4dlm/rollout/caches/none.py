"""No cache: every step is a full forward, exact for every attention kind."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.models.spec import ATTENTION_KINDS
from rl4dlm.rollout.caches.policy import CachePolicy


class NoCache(CachePolicy):
    """Feeds the whole row at every step."""

    name: ClassVar[str] = "none"
    uses_store: ClassVar[bool] = False
    exact_for: ClassVar[frozenset[str]] = frozenset(ATTENTION_KINDS)
    feeds_again: ClassVar[bool] = True

    def feed_from(self, step: Tensor, block_start: Tensor) -> Tensor:
        return torch.full_like(step, -1)
