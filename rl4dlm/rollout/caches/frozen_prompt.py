"""FreeCache of FlashDLM (arXiv 2505.21467): keys and values of the prompt and of finished blocks are computed once.

The first forward of a row is full and freezes the prompt, with the whole canvas masked. Every later one feeds the
active block and all that follows; a block that is finished is fed once more in the first step of the next one, and is
frozen then. Nothing is ever refreshed, so what is frozen knows nothing of what is written later. Positions fed are
those of `prefix` less its full forwards: `s (S - a) + b` for a block that starts at column a, after one of b slots, in
s steps.

Where attention is left to right nothing that is frozen depends on what is written later: the same as `prefix`, the
exact block cache.

Differences from the released code, which freezes a block from the last of its own forwards, and so with a mask token
where that very forward writes: no mask token is ever frozen here. Where logits are shifted, the slot before the block
is fed with it and frozen with the block. Confidence, at temperatures above 0 a softmax of perturbed logits there, is
the schedule's; rows of any number and with prompts of different length share a batch. The small causal model that
guides which tokens are written (the paper's second part) changes the distribution and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, register


@register
@dataclass(frozen=True)
class FrozenPromptCache(CachePolicy):
    """Feeds the prompt once, and each block until it is finished and once more."""

    name: ClassVar[str] = "frozen_prompt"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)
    shares: ClassVar[bool] = True

    def plan(self, now: Now) -> Plan:
        first = torch.where(now.block_step == 0, now.before, now.start)
        return Plan(first.masked_fill(now.refreshed < 0, -1))
