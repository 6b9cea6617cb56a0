"""Fast-dLLM's prefix cache (arXiv 2505.22618, section 3.1).

The first step of a block is a full forward that also fills the store; the block's later steps feed the block and what
follows it, against the stored keys and values of what precedes it. With full attention those are stale as soon as a
token is committed, so logits are approximate.

Where attention is left to right the same policy is the exact block cache of block diffusion: the first step of a block
also feeds the block before it, now finished, whose keys are then final; later steps feed the block alone. The commit
forward that reference samplers make after each block is thus part of the next block's first step.

Differences from Fast-dLLM's released code: keys are stored rotated and written in place; prompts of different length
and rows in different blocks share a batch; a block that is complete after its first step costs no second one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.rollout.caches.policy import CachePolicy


class PrefixCache(CachePolicy):
    """Refreshes at block entry, then reuses everything before the block."""

    name: ClassVar[str] = "prefix"
    uses_store: ClassVar[bool] = True
    exact_for: ClassVar[frozenset[str]] = frozenset({"block_causal", "context_causal", "causal"})
    feeds_again: ClassVar[bool] = True

    def feed_from(self, step: Tensor, block_start: Tensor) -> Tensor:
        return torch.where(step == 0, -1, block_start)
