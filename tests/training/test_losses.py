"""Losses that TRL lacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rl4dlm.training.losses import (
    denoising_cross_entropy,
    kl_estimate,
    ratio_bound,
    weighted_likelihood,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_denoising_cross_entropy_is_a_weighted_sum_over_a_given_number_of_tokens() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -4.0]], requires_grad=True)
    weight = torch.tensor([[2.0, 0.0, 0.5]])
    loss = denoising_cross_entropy(log_probs, weight, 3)
    assert loss.item() == pytest.approx((2 * 1 + 0.5 * 4) / 3)
    loss.backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -weight / 3)


def test_without_targets_it_is_zero_not_nan() -> None:
    assert denoising_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor(0)).item() == 0


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_of_two_distributions_over_five_tokens(kind: str) -> None:
    logits, other = (0.3 * numbers(5, seed=s) for s in (0, 1))
    logits.requires_grad_()
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    sampled = (log_p.detach().exp() * kl_estimate(log_p - log_q, kind)).sum()
    (right,), (found,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (exact, sampled))
    if kind == "k1":  # the value is right, the gradient nothing
        assert sampled.item() == pytest.approx(exact.item(), abs=1e-12)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    if kind == "k2":  # the gradient is right, the value close
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    if kind == "k3":  # the value is right, the gradient that of KL(other, policy)
        assert sampled.item() == pytest.approx(exact.item(), abs=1e-12)
        torch.testing.assert_close(found, log_p.exp().detach() - log_q.exp(), rtol=0, atol=1e-12)
    assert kl_estimate(torch.zeros(3), kind).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_times_the_ratio_have_the_right_gradient_on_samples_of_an_older_policy(kind: str) -> None:
    logits, other, old = (0.3 * numbers(5, seed=s) for s in (0, 1, 2))
    logits.requires_grad_()
    log_p, log_q, log_old = (values.log_softmax(-1) for values in (logits, other, old))
    exact = (log_p.exp() * (log_p - log_q)).sum()
    sampled = (log_old.exp() * (log_p - log_old).exp() * kl_estimate(log_p - log_q, kind)).sum()
    (right,), (found,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (exact, sampled))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_kl_estimates_are_not_negative_where_they_say_so_and_unknown_ones_are_refused() -> None:
    difference = numbers(100)
    assert (kl_estimate(difference, "k2") >= 0).all() and (kl_estimate(difference, "k3") >= 0).all()
    with pytest.raises(ValueError, match="kl='k4' is not allowed; choose k1, k2 or k3"):
        kl_estimate(difference, "k4")


def test_weighted_likelihood_has_no_gradient_in_its_weights() -> None:
    scores, weights = numbers(4).requires_grad_(), numbers(4, seed=1).requires_grad_()
    weighted_likelihood(scores, weights).sum().backward()
    assert weights.grad is None and scores.grad is not None
    torch.testing.assert_close(scores.grad, -weights.detach())


def test_the_bound_of_a_ratio_is_one_and_tight_without_spread() -> None:
    """mean(A b) <= A exp(mean(log ratio)), and their gradients are equal where all ratios are 1."""
    for sign in (-2.0, 2.0):
        advantages = torch.full((50, 1), sign, dtype=torch.float64)
        spread = numbers(50, 6)
        bound = (advantages * ratio_bound(spread, advantages)).mean(-1)
        assert (bound <= (advantages.squeeze(-1) * spread.mean(-1).exp()) + 1e-12).all()
        ones = torch.zeros(50, 6, dtype=torch.float64, requires_grad=True)
        of_bound, of_ratio = (
            torch.autograd.grad(value, ones)[0]
            for value in (
                (advantages * ratio_bound(ones, advantages)).mean(-1).sum(),
                (advantages.squeeze(-1) * ones.mean(-1).exp()).sum(),
            )
        )
        torch.testing.assert_close(of_bound, of_ratio)
