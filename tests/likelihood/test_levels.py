"""Levels: UniGRPO's rising ones, GDPO's nodes, coupled pairs, and canvases without an end."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.likelihood.quadrature import Quadrature, gauss_legendre
from rl4dlm.likelihood.views import Rows
from tests.likelihood.tabular import MASK, PROMPT, TOKENS, Tabular, all_masks, completions, joint, mask_counts, rows_of
from tests.likelihood.test_estimators import ESTIMATORS, name, rows
from tests.rollout.chi_square import chi_square


def zeros(count: int, length: int, valid: int | None = None) -> Rows:
    return rows_of(torch.zeros(length, dtype=torch.long), count, valid)


def check_share(hidden: Tensor, level: float) -> None:
    """Tokens that are hidden independently: their share, at five standard deviations."""
    bound = 5 * (level * (1 - level) / hidden.numel()) ** 0.5 + 1e-12
    assert abs(float(hidden.double().mean()) - level) < bound


# --- UniGRPO ----------------------------------------------------------------------------------------------------------


def test_rising_levels_are_those_recorded() -> None:
    """The example of the paper's formula: 5 passes from 100 of 1000."""
    estimator, start = IIDRatio(num_iterations=5), torch.tensor(0.1, dtype=torch.float64)
    levels = [1000 * float(estimator.level(start, n)) for n in range(5)]
    assert levels == pytest.approx([100, 325, 550, 775, 1000], abs=1e-9)
    assert float(IIDRatio(num_iterations=1).level(start, 0)) == 0.1
    assert float(IIDRatio(num_iterations=3, num_steps=7).level(start, 1)) == 3 / 7  # floor(1 * 7 / 2) + 0


@pytest.mark.parametrize(("passes", "steps"), [(1, 1000), (2, 1000), (4, 1000), (5, 8), (12, 128)])
def test_levels_rise_from_the_start_to_one_in_steps_as_even_as_can_be(passes: int, steps: int) -> None:
    estimator = IIDRatio(num_iterations=passes, num_steps=steps)
    starts = torch.linspace(0, 1, 3001, dtype=torch.float64)[:-1]
    counts = torch.stack([estimator.level(starts, n) * steps for n in range(passes)])
    whole = counts.round()
    torch.testing.assert_close(counts, whole, rtol=0, atol=1e-9)
    assert torch.equal(whole[0], (starts * steps).floor())
    if passes > 1:
        rises = whole.diff(dim=0)
        assert (rises >= 0).all() and (whole[-1] == steps).all()
        assert (rises.amax(0) - rises.amin(0) <= 1).all()


@pytest.mark.parametrize("start", [0.1, 0.6])
def test_the_share_of_hidden_tokens_is_the_level_of_the_pass(start: float) -> None:
    estimator, batch = IIDRatio(num_iterations=5, level_range=(start, start)), zeros(500, 40, valid=32)
    for n in range(5):
        level = (int(n * (1000 - 1000 * start) / 4) + 1000 * start) / 1000
        hidden = estimator.draw(batch, seed=0, iteration=n).hidden[..., PROMPT : PROMPT + 32]
        check_share(hidden, level)
        assert n < 4 or hidden.all()
        # Independently of each other: the numbers of tokens in a row have a binomial spread.
        spread = float(hidden.sum(-1).double().var())
        assert spread == pytest.approx(32 * level * (1 - level), rel=5 * (2 / 500) ** 0.5, abs=1e-12)


def test_a_row_keeps_its_start_over_the_passes_and_starts_are_uniform() -> None:
    """Weights of one over the level tell the level."""
    passes, batch = 4, zeros(2000, 96)
    estimator = IIDRatio(num_iterations=passes, weight="level")
    found = []
    for n in range(passes):
        views = estimator.draw(batch, seed=0, iteration=n)
        found.append(1000 / views.weight.amax((1, 2)))  # of a row without hidden tokens: infinite
    known = found[0].isfinite() & found[1].isfinite()
    assert known.double().mean() > 0.97
    first = found[0].round()
    for n in range(1, passes):
        expected = (n * (1000 - first) / (passes - 1)).floor() + first
        torch.testing.assert_close(found[n][known], expected[known], rtol=0, atol=1e-6)
    decile = torch.where(first.isfinite(), first, 0.0).long() // 100  # rows without hidden tokens have low levels
    chi_square(decile.bincount(minlength=10), torch.ones(10))


# --- GDPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "weights"),
    [
        ([0.5], [1.0]),
        ([0.211325, 0.788675], [0.5, 0.5]),
        ([0.112702, 0.5, 0.887298], [5 / 18, 8 / 18, 5 / 18]),
        ([0.069432, 0.330009, 0.669991, 0.930568], [0.173927, 0.326073, 0.326073, 0.173927]),
        ([0.046910, 0.230765, 0.5, 0.769235, 0.953090], [0.118463, 0.239314, 0.284444, 0.239314, 0.118463]),
    ],
)
def test_nodes_and_weights_are_those_recorded_and_integrate_powers(levels: list[float], weights: list[float]) -> None:
    found = gauss_legendre(len(levels))
    assert found[0].tolist() == pytest.approx(levels, abs=5.1e-7)
    assert found[1].tolist() == pytest.approx(weights, abs=5.1e-7)
    for power in range(2 * len(levels) + 1):
        integral = float((found[0] ** power * found[1]).sum())
        exact = power < 2 * len(levels)
        assert (integral == pytest.approx(1 / (power + 1), abs=1e-14)) == exact, power


@pytest.mark.parametrize(("valid", "counts"), [(256, (28, 128, 227)), (10, (1, 5, 8)), (3, (1, 1, 2)), (1, (1, 1, 1))])
def test_every_node_hides_the_number_or_the_share_of_tokens_that_it_says(
    valid: int, counts: tuple[int, int, int]
) -> None:
    batch, levels = zeros(400, valid + 2, valid), gauss_legendre(3)[0].tolist()
    exact = Quadrature(masks="count", masks_per_node=2).draw(batch, seed=0, iteration=0)
    expected = torch.tensor(counts).repeat_interleave(2).expand(400, 6)
    assert torch.equal(exact.scored.sum(-1), expected)
    independent = Quadrature(masks_per_node=2).draw(batch, seed=0, iteration=0).scored[..., :valid]
    for node, level in enumerate(levels):
        check_share(independent[:, 2 * node : 2 * node + 2], level)


NODES, RANDOM = Quadrature(3), ELBO(3, "bernoulli", stratify="none")
AT_LEAST_ONE = replace(RANDOM, level_range=(0.2, 1.0))  # 1 / |y| for 5 tokens, as in GDPO's code
NODE_COUNTS, RANDOM_COUNTS = Quadrature(3, masks="count", weight="count"), ELBO(3, "count", stratify="none")


def variance(estimator: Estimator, table: Tabular, y: Tensor, count: int = 3000) -> float:
    batch = rows_of(y, count)
    views = estimator.draw(batch, seed=0, iteration=0)
    return float(table.scores(estimator, views, batch.canvas_ids).sum(-1).var())


def sharpening(noise: float, y: Tensor) -> Tabular:
    """A table that is the surer of y the more it sees, whichever tokens these are, and some noise."""
    table = Tabular(len(y), seed=0)
    canvases = torch.tensor(list(itertools.product(range(TOKENS + 1), repeat=len(y))))
    seen = (canvases != MASK).sum(-1)[:, None, None]
    table.logits = noise * table.logits + seen * torch.nn.functional.one_hot(y, TOKENS)
    return table


def test_nodes_vary_less_than_as_many_random_levels() -> None:
    for table in (Tabular(5, seed=0), Tabular(5, joint=joint(5, seed=0))):
        ratios = [variance(NODES, table, y) / variance(RANDOM, table, y) for y in completions(5)[::120]]
        assert max(ratios) < 0.9, ratios


def test_nodes_have_only_the_variance_of_masks_where_the_level_is_what_matters() -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    alike, other = sharpening(0.0, y), sharpening(0.1, y)
    assert variance(NODE_COUNTS, alike, y) < 1e-20 and variance(RANDOM_COUNTS, alike, y) > 0.1
    assert variance(NODE_COUNTS, other, y) < 0.05 * variance(RANDOM_COUNTS, other, y)
    for table in (alike, other):
        assert variance(NODES, table, y) < 0.8 * variance(AT_LEAST_ONE, table, y)


def test_it_is_not_so_for_short_sequences_where_levels_near_zero_are_left_out() -> None:
    """The lowest of 3 nodes is at 0.11, where a hidden token counts 9 times, and levels of 5 tokens start at 0.2."""
    table = Tabular(5, seed=1)
    ratios = [variance(NODES, table, y) / variance(AT_LEAST_ONE, table, y) for y in completions(5)[::120]]
    assert min(ratios) > 1, ratios


# --- coupled-GRPO -----------------------------------------------------------------------------------------------------


def pairs_at(m: float, table: Tabular, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, `[N, L]` over all masks: the terms of the two views of a pair, and the masks' probabilities `[N]`."""
    masks = all_masks(len(y))
    count = masks.sum(-1).double()
    batch = rows_of(y, len(masks))
    views = Coupled(1).views(batch, masks[:, None], torch.full((len(masks), 1), m, dtype=torch.float64))
    each = table.view_log_probs(views, batch.canvas_ids) * views.weight * 2  # times lambda + 1
    return each[:, 1], each[:, 2], m**count * (1 - m) ** (len(y) - count)


def without_context(length: int) -> Tabular:
    table = Tabular(length, seed=1)
    table.logits = table.logits[-1:].expand_as(table.logits)
    return table


@pytest.mark.parametrize("m", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("pairs", [1, 2])
def test_without_context_coupled_scores_are_a_multiple_of_log_probabilities(m: float, pairs: int) -> None:
    table, y = without_context(4), torch.tensor([0, 2, 1, 0])
    a = table.log_probs(y, torch.ones(4, dtype=torch.bool))
    masks = all_masks(4)
    index = torch.cartesian_prod(*[torch.arange(16)] * pairs).view(-1, pairs)
    chosen = masks[index]  # [N, J, L]
    batch, estimator = rows_of(y, len(index)), Coupled(pairs)
    level = torch.full((len(index), pairs), m, dtype=torch.float64)
    scores = table.scores(estimator, estimator.views(batch, chosen, level), batch.canvas_ids)
    each = torch.where(chosen, 1 / level[..., None], 1 / (1 - level[..., None])).sum(1)
    torch.testing.assert_close(scores, a * (1 + each) / (pairs + 1), rtol=0, atol=1e-12)
    count = masks.sum(-1).double()
    probability = (m**count * (1 - m) ** (4 - count))[index].prod(-1)
    expected = a * (2 * pairs + 1) / (pairs + 1)  # 1.5 for one pair, whatever the level
    torch.testing.assert_close((scores * probability[:, None]).sum(0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "context"), [(0.5, True), (0.2, False), (0.5, False), (0.8, False), (0.3, True)])
def test_the_views_of_a_pair_are_antithetic(m: float, context: bool) -> None:
    """A token is scored in one of them: their product is zero, and the covariance minus the product of the means."""
    table, y = Tabular(4, seed=2) if context else without_context(4), torch.tensor([1, 0, 2, 2])
    first, second, probability = pairs_at(m, table, y)
    assert not (first * second).any() and ((first != 0) | (second != 0)).all()
    mean = [(g * probability[:, None]).sum(0) for g in (first, second)]
    covariance = ((first - mean[0]) * (second - mean[1]) * probability[:, None]).sum(0)
    torch.testing.assert_close(covariance, -mean[0] * mean[1], rtol=0, atol=1e-12)
    assert (covariance < -1e-3).all()
    if m == 0.5 or not context:  # the two have one mean v then, and the covariance is -v^2
        torch.testing.assert_close(covariance, -(mean[0] ** 2), rtol=0, atol=1e-12)


def test_the_sample_covariance_of_drawn_pairs_is_minus_the_squared_mean() -> None:
    table, y, count = Tabular(4, seed=2), torch.tensor([1, 0, 2, 2]), 8000
    estimator, batch = Coupled(2, level_range=(0.5, 0.5)), rows_of(y, count)
    views = estimator.draw(batch, seed=0, iteration=0)
    terms = (table.view_log_probs(views, batch.canvas_ids) * views.weight * 3)[:, 1:].unflatten(1, (2, 2))
    v = -terms[:, 0].mean((0, 1))
    centred = terms - terms.mean(0)
    within, across = (centred[:, 0, 0] * centred[:, 0, 1]).mean(0), (centred[:, 0] * centred[:, 1]).mean(0)
    torch.testing.assert_close(within, -(v**2), rtol=0.1, atol=0)
    assert (across.abs() < 0.1 * v**2).all(), "pairs are independent of each other"
    masks = views.hidden[:, 1, PROMPT:]
    chi_square(mask_counts(masks), torch.ones(16))


def test_drawn_pairs_cover_every_token_once_at_levels_that_are_uniform_in_their_range() -> None:
    low, high, pairs = 0.2, 0.8, 2
    batch = zeros(3000, 12, valid=9)
    views = Coupled(pairs, (low, high)).draw(batch, seed=0, iteration=0)
    assert views.hidden[:, 0, PROMPT:].all() and not views.hidden[..., :PROMPT].any()
    weight = views.weight[:, 1:].unflatten(1, (pairs, 2))[..., :9]
    assert ((weight > 0).sum(2) == 1).all()
    level = 1 / (weight.amax(-1) * (pairs + 1))  # [B, J, 2], infinite where nothing is hidden
    both = level.isfinite().all(-1)
    torch.testing.assert_close(level[both].sum(-1), torch.ones(int(both.sum())).double(), rtol=0, atol=1e-9)
    m = torch.where(level[..., 0].isfinite(), level[..., 0], 1 - level[..., 1])
    assert bool((m >= low).all()) and bool((m <= high).all())
    bins = ((m - low) / (high - low) * 10).long().clamp(max=9)
    for j in range(pairs):
        chi_square(bins[:, j].bincount(minlength=10), torch.ones(10))
    assert abs(float(torch.corrcoef(m.T)[0, 1])) < 5 / 3000**0.5, "each pair has a level of its own"


# --- ESPO, and all others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=name)
def test_a_canvas_without_an_end_is_valid_as_a_whole(estimator: Any) -> None:
    batch = rows()
    found = []
    for scope in ("valid", "canvas"):
        whole = Rows(batch.prompt_ids, batch.prompt_mask, batch.canvas_ids, torch.ones_like(batch.valid), batch.row_ids)
        found.append(replace(estimator, scope=scope).draw(whole, seed=0, iteration=1))
    assert torch.equal(found[0].hidden, found[1].hidden) and torch.equal(found[0].weight, found[1].weight)
    with_end = replace(estimator, scope="canvas").draw(batch, seed=0, iteration=1)
    assert torch.equal(with_end.weight, found[1].weight), "the end does not matter to a canvas"
