"""Which choices of steps and baselines leave a policy gradient, by enumeration of all trajectories of three tokens.

Tokens are written one by one in random order. The exact gradient is that of E[R]; the one of an estimator is its mean
over all trajectories. Each claim has a control that breaks it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.step_selectors import AllSteps, EntropyThreshold, SampledSteps, Segments, TopEntropy
from rl4dlm.likelihood.steps import RecordedSteps, StepSelector
from rl4dlm.likelihood.views import Rows, StepFacts
from tests.likelihood.tabular import MASK, TOKENS, Tabular, completions
from tests.likelihood.test_steps import Evenly

LENGTH = 3


def model() -> Tabular:
    table = Tabular(LENGTH, seed=3)
    table.logits.requires_grad_()
    return table


def trajectories(table: Tabular) -> Rows:
    """Every order of writing every completion, with the entropies of what was drawn from."""
    orders = torch.tensor(list(itertools.permutations(range(LENGTH))))  # the step of each slot
    texts = completions(LENGTH)
    step = orders.repeat_interleave(len(texts), dim=0)
    y = texts.repeat(len(orders), 1)
    prompt = torch.ones(len(y), 1, dtype=torch.long)
    rows = Rows(prompt, prompt, y, torch.ones_like(y).bool(), torch.arange(len(y)), commit_step=step)
    entropy = torch.zeros(y.shape, dtype=torch.float64)
    with torch.no_grad():
        for k in range(LENGTH):
            each = distributions(table, torch.where(step >= k, MASK, y))
            entropy = torch.where(step == k, -(each.exp() * each).sum(-1), entropy)
    rows.facts = StepFacts(entropy, threshold=torch.full((len(y),), float(entropy.median()), dtype=torch.float64))
    return rows


def distributions(table: Tabular, canvas: Tensor) -> Tensor:
    """Log-probabilities `[..., L, 3]` of every slot of a canvas."""
    index = (canvas * (TOKENS + 1) ** torch.arange(LENGTH).flip(0)).sum(-1)
    return table.logits[index].log_softmax(-1)


def rewards(y: Tensor) -> Tensor:
    """Some number of the whole completion."""
    return ((y * torch.tensor([5, 3, 7])).sum(-1) % 4).double() - 1


def step_log_probs(table: Tabular, rows: Rows) -> Tensor:
    """ell_s, `[B, 3]`, of every step by itself."""
    views = RecordedSteps(AllSteps()).draw(rows, seed=0, iteration=0)
    return table.view_log_probs(views, rows.canvas_ids).sum(-1)


def probability(table: Tabular, rows: Rows) -> Tensor:
    """Of each trajectory."""
    return step_log_probs(table, rows).sum(-1).exp() / 6


def gradient(value: Tensor, table: Tabular) -> Tensor:
    return torch.autograd.grad(value, table.logits)[0]


def exact(table: Tabular, rows: Rows) -> Tensor:
    return gradient((probability(table, rows) * rewards(rows.canvas_ids)).sum(), table)


def estimated(table: Tabular, rows: Rows, selector: StepSelector, reward: Tensor, starts: int = 1) -> Tensor:
    """The mean over trajectories, and draws of steps, of the reward times the gradient of the score."""
    many = rows[torch.arange(len(rows)).repeat_interleave(starts)]
    trail = selector.trail(many, "valid")
    noise = Evenly(many[: starts or 1], 0, 0)
    level = noise.spread("", getattr(selector, "count", 1), "").repeat(len(rows), 1)
    noise.spread = lambda *_: level  # type: ignore[method-assign]
    steps = selector.select(trail, noise)
    place = trail.step[:, None]
    scored = (place >= steps.first[..., None]) & (place <= steps.last[..., None])
    hidden = place >= steps.first[..., None]
    each = table.log_probs(many.canvas_ids[:, None], hidden) * scored * steps.weight[..., None]
    weight = (probability(table, rows) * reward).detach().repeat_interleave(starts) / starts
    return gradient((weight * each.sum((1, 2))).sum(), table)


def test_products_of_step_probabilities_add_up_to_one() -> None:
    table = model()
    rows = trajectories(table)
    assert float(probability(table, rows).sum().detach()) == pytest.approx(1.0, abs=1e-14)
    for selector in (AllSteps(2), Segments(1), Segments(2)):  # of each order a product of mean fields
        views = RecordedSteps(selector).draw(rows, seed=0, iteration=0)
        scores = table.scores(RecordedSteps(selector), views, rows.canvas_ids)
        assert float(scores.sum(-1).exp().sum().detach() / 6) == pytest.approx(1.0, abs=1e-14)


def test_all_steps_and_sampled_ones_give_the_exact_gradient() -> None:
    table = model()
    rows = trajectories(table)
    true, reward = exact(table, rows), rewards(rows.canvas_ids)
    assert true.norm() > 0.1
    # Boundaries of the draws are multiples of 1/6, so that six starts are all there are to tell apart.
    for selector, starts in ((AllSteps(), 1), (SampledSteps(1), 6), (SampledSteps(2), 6)):
        found = estimated(table, rows, selector, reward, starts)
        assert float((found - true).abs().max()) < 1e-14, selector
    mean = estimated(table, rows, SampledSteps(2, scale="mean"), reward, 6)
    assert float((mean - true / LENGTH).abs().max()) < 1e-14, "every completion has three steps"
    # Controls: merged steps and the largest entropies are other directions; measured, and kept.
    cosines = {
        name: float(torch.cosine_similarity(estimated(table, rows, s, reward).flatten(), true.flatten(), dim=0))
        for name, s in {"merged": AllSteps(3), "two": Segments(2), "top": TopEntropy(1)}.items()
    }
    assert 0.1 < cosines["merged"] < cosines["two"] < 0.99
    assert cosines["merged"] < cosines["top"] < 0.99


def test_a_constant_reward_has_no_gradient_unless_steps_are_chosen_by_what_came_later() -> None:
    table = model()
    rows = trajectories(table)
    ones = torch.ones(len(rows), dtype=torch.float64)
    chosen = RecordedSteps(EntropyThreshold()).draw(rows, seed=0, iteration=0).scored.any(-1).sum(-1)
    assert len(chosen.unique()) > 1, "rows keep different numbers of steps"
    for selector, starts in ((AllSteps(), 1), (EntropyThreshold(), 1), (SampledSteps(2), 6)):
        assert float(estimated(table, rows, selector, ones, starts).abs().max()) < 1e-14, selector
    for count in (1, 2):
        assert float(estimated(table, rows, TopEntropy(count), ones).norm()) > 0.01


def completed(table: Tabular, rows: Rows, after: int) -> Tensor:
    """Rewards `[B, 3]` of the most probable completion of the state before each step, or `after` = 1 after it."""
    found = []
    for k in range(LENGTH):
        canvas = torch.where(rows.commit_step >= k + after, MASK, rows.canvas_ids)
        best = distributions(table, canvas).argmax(-1)
        found.append(rewards(torch.where(canvas == MASK, best, canvas)))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_a_baseline_may_see_the_state_before_a_step_and_not_the_one_after(share: float) -> None:
    """R + lambda (R - r_s) has 1 + lambda times the exact gradient, where r_s is of the state before."""
    table = model()
    rows = trajectories(table)
    true, reward = exact(table, rows), rewards(rows.canvas_ids)[:, None]

    def of(after: int) -> Tensor:
        advantages = (reward + share * (reward - completed(table, rows, after))) / (1 + share)
        weight = (probability(table, rows)[:, None] * advantages).detach()
        return gradient((weight * step_log_probs(table, rows)).sum(), table)

    assert float((of(0) - true).abs().max()) < 1e-14
    if share:
        assert float((of(1) - true).norm()) > 0.1 * float(true.norm()), "a baseline that has seen the action"
