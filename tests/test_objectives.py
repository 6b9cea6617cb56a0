"""Losses that TRL lacks."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.objectives import denoising_cross_entropy


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
