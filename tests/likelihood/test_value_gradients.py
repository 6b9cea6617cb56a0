"""Values as baselines, by enumeration of all trajectories of three tokens: which of them leave the policy gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.views import Rows
from rl4dlm.training.value import earned_at, valued_tokens
from tests.likelihood.tabular import MASK, TOKENS, Tabular
from tests.likelihood.test_step_gradients import LENGTH, exact, gradient, model, probability, rewards, trajectories


def states(rows: Rows, after: int = 0) -> Tensor:
    """The number `[B, 3]` of the state before each token was written, or `after` = 1 after it."""
    canvas = torch.where(
        rows.commit_step[:, None] >= rows.commit_step[..., None] + after, MASK, rows.canvas_ids[:, None]
    )
    return (canvas * (TOKENS + 1) ** torch.arange(LENGTH).flip(0)).sum(-1)


def with_values(table: Tabular, rows: Rows, values: Tensor, lam: float, lead: Tensor | None = None) -> Tensor:
    """The expected gradient, from values `[B, 3]` of the tokens' states; a token is a step, or all are one block."""
    unit = rows.commit_step if lead is None else torch.zeros_like(rows.commit_step)
    steps = 1 + int(unit.max())
    earned = earned_at(rewards(rows.canvas_ids), torch.ones(len(rows), steps), "end")
    found = valued_tokens(values, unit, earned, gamma=1.0, lam=lam, lead=lead)
    every = torch.stack([table.log_probs(rows.canvas_ids, rows.commit_step >= k) for k in range(LENGTH)], dim=1)
    own = every.gather(1, rows.commit_step[:, None])[:, 0]  # of each token in its state
    return gradient((probability(table, rows).detach()[:, None] * found.advantages * own).sum(), table)


def numbers(rows: Rows, of: Tensor) -> Tensor:
    """Some number for each state, or for each token of one."""
    table = torch.randn((TOKENS + 1) ** LENGTH, LENGTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return table[of].diagonal(dim1=1, dim2=2)


def test_any_value_of_the_state_before_leaves_the_gradient_and_one_of_the_state_after_does_not() -> None:
    table = model()
    rows = trajectories(table)
    true = exact(table, rows)
    assert float((with_values(table, rows, numbers(rows, states(rows)), 1.0) - true).abs().max()) < 1e-14
    assert float((with_values(table, rows, torch.zeros(len(rows), LENGTH).double(), 1.0) - true).abs().max()) < 1e-14
    biased = with_values(table, rows, numbers(rows, states(rows, after=1)), 1.0)
    assert float((biased - true).norm()) > 0.1 * float(true.norm())


def true_values(table: Tabular, rows: Rows) -> Tensor:
    """V(x) = E[R | x] `[B, 3]`: the mean reward of the trajectories through the state before each token."""
    at, chance, size = states(rows), probability(table, rows).detach(), (TOKENS + 1) ** LENGTH
    mass = torch.zeros(size).double().index_add(0, at.flatten(), chance[:, None].expand_as(at).flatten())
    sums = (chance * rewards(rows.canvas_ids))[:, None].expand_as(at).flatten()
    return (torch.zeros(size).double().index_add(0, at.flatten(), sums) / mass.clamp(min=1e-300))[at]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_true_values_leave_it_whatever_lambda_is_and_wrong_ones_do_not(lam: float) -> None:
    table = model()
    rows = trajectories(table)
    true, at = exact(table, rows), states(rows)
    assert float((with_values(table, rows, true_values(table, rows), lam) - true).abs().max()) < 1e-14
    wrong = with_values(table, rows, numbers(rows, at[:, :1].expand_as(at)), lam)
    assert lam == 1.0 or float((wrong - true).norm()) > 0.1 * float(true.norm())


def test_the_value_of_a_block_is_that_of_the_state_before_its_first_step() -> None:
    table = model()
    rows = trajectories(table)
    true, at = exact(table, rows), states(rows)
    first = rows.commit_step == 0
    assert float((with_values(table, rows, numbers(rows, at), 1.0, lead=first) - true).abs().max()) < 1e-14
    late = rows.commit_step == 1  # knows the first token
    assert float((with_values(table, rows, numbers(rows, at), 1.0, lead=late) - true).norm()) > 0.05 * true.norm()


def test_what_true_values_do_to_the_variance() -> None:
    """Of the gradient of one trajectory, the sum over its entries. Measured, and kept: docs/algorithms.md has them."""
    table = model()
    rows = trajectories(table)
    true, chance, reward = exact(table, rows), probability(table, rows).detach(), rewards(rows.canvas_ids)
    every = torch.stack([table.log_probs(rows.canvas_ids, rows.commit_step >= k) for k in range(LENGTH)], dim=1)
    own = every.gather(1, rows.commit_step[:, None])[:, 0]
    earned = earned_at(reward, torch.ones(len(rows), LENGTH), "end")

    def variance(values: Tensor, lam: float) -> float:
        advantages = valued_tokens(values, rows.commit_step, earned, gamma=1.0, lam=lam).advantages
        total = (advantages * own).sum(-1)
        gradients = (torch.autograd.grad(each, table.logits, retain_graph=True)[0] for each in total)
        return float(chance @ torch.stack([g.square().sum() for g in gradients]) - true.square().sum())

    values = true_values(table, rows)
    none, mean = variance(0 * values, 1.0), variance(0 * values + chance @ reward, 1.0)
    long, half, short = (variance(values, lam) for lam in (1.0, 0.5, 0.0))
    assert [none, mean, long, half, short] == pytest.approx([1.956, 1.706, 1.837, 1.082, 0.929], abs=1e-3)
