"""Losses that TRL lacks, as functions of log-probabilities and weights.

Owns formulas only. Where log-probabilities come from is the likelihood's business, averaging over processes the
trainer's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def denoising_cross_entropy(log_probs: Tensor, weight: Tensor, denominator: Tensor | float) -> Tensor:
    """Weighted cross-entropy of hidden tokens: `-sum(weight * log_probs) / denominator`.

    With weight 1/t at tokens hidden at level t, and the number of target tokens as denominator, its expectation over
    t ~ U(0, 1) and masks is the negative evidence lower bound per token (LLaDA, arXiv 2502.09992, equations 3 and 5).

    Args:
        log_probs: `[B, K, L]` (or any shape), log-probabilities of the true tokens.
        weight: the same shape; zero where a token is not hidden.
        denominator: what the sum is divided by; at least 1 is used.

    Returns:
        A scalar in nats per token.
    """
    return -(log_probs * weight).sum() / torch.as_tensor(denominator).clamp(min=1)
