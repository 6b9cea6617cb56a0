"""Losses that TRL lacks, as functions of log-probabilities and weights.

Owns formulas only; those of clipped ratios are in `rl4dlm.training.clipping`. Where log-probabilities come from is the
likelihood's business, averaging over processes the trainer's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ratio_bound(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """b with `mean(A b) <= A exp(mean(log_ratio))`, a mean over estimates of one sequence (BGPO, arXiv 2510.11683).

    `1 + log_ratio` where A >= 0, as exp(x) >= 1 + x; `exp(log_ratio)` elsewhere, by Jensen's inequality.
    """
    return torch.where(advantages >= 0, 1 + log_ratio, log_ratio.exp())


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """An estimate of KL(policy, other) from `log_ratio` = log policy - log other, on samples of the policy.

    Args:
        log_ratio: d, per token or per sequence.
        kind: `"k1"`, d: unbiased, but its plain gradient is that of `log policy` whatever the other one is: zero on
            average on samples of the policy, and away from samples of an older one. `"k2"`, d^2 / 2: its gradient is
            the right one on samples of the policy, and it is the only one that is usable on whole sequences. `"k3"`,
            exp(-d) + d - 1: TRL's (http://joschu.net/blog/kl-approx.html). Multiplied by the ratio of the policy to the
            one that the samples are of, k1 and k3 have the right gradient.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return (-log_ratio).exp() + log_ratio - 1
    raise ValueError(f"kl={kind!r} is not allowed; choose k1, k2 or k3")


def weighted_likelihood(scores: Tensor, weights: Tensor) -> Tensor:
    """`-w S`, the loss of ratio-free methods, per sequence `[B]`; `weights` are constants."""
    return -weights.detach() * scores


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
