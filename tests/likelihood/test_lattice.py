"""How estimators and losses become one another, and what is exact about each: enumerated, in float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.blockwise import BlockELBO, BlockwiseBound
from rl4dlm.likelihood.complementary import Complementary
from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.denoising import denoising_views
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.quadrature import Quadrature, gauss_legendre
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.training.clipping import Clip, surrogate
from rl4dlm.training.losses import denoising_cross_entropy, weighted_likelihood
from tests.likelihood.tabular import Tabular, all_masks, completions, count_masks, iid_masks, joint, rows_of
from tests.likelihood.test_estimators import ESTIMATORS, name, rows

PROMPT = 2
Y = torch.tensor([0, 2, 1, 1, 0])


def same(found: Views, expected: Views) -> None:
    """What they hide on the canvas and what counts, where something counts."""
    canvas = expected.weight.shape[2]
    assert torch.equal(found.hidden[..., -canvas:], expected.hidden[..., -canvas:])
    torch.testing.assert_close(found.weight.double(), expected.weight.double(), rtol=0, atol=1e-12)


# --- one estimator as a special case of another -----------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["valid", "canvas"])
@pytest.mark.parametrize(
    "other",
    [
        Coupled(pairs=0),
        IIDRatio(level_range=(1.0, 1.0)),
        IIDRatio(num_iterations=3),  # in its last iteration
        LeftToRight(tokens_per_view=8),
        BlockwiseBound(1, "all", "elbo", p_mask_prompt=0.0),
        BlockwiseBound(1, "all", "eubo", p_mask_prompt=0.0),
    ],
    ids=name,
)
def test_with_everything_hidden_they_are_the_mean_field(other: Any, scope: str) -> None:
    batch, table = rows_of(Y, 7, valid=4), Tabular(5, seed=1)
    expected, other = MeanField(0.0, scope), dataclasses.replace(other, scope=scope)
    views = [e.draw(batch, seed=0, iteration=2) for e in (expected, other)]
    scores = [table.scores(e, v, batch.canvas_ids) for e, v in zip((expected, other), views, strict=True)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-12)


def test_bounds_are_one_in_the_same_masks() -> None:
    batch = rows_of(Y, 32, valid=5)
    masks = all_masks(5)[:, None]  # [32, 1, 5]
    level = torch.linspace(0.1, 0.9, 32, dtype=torch.float64)[:, None]
    some = masks.any(-1, keepdim=True)
    expected = ELBO(1, "count").views(batch, masks, level)
    block = torch.zeros(32, 1, dtype=torch.long)
    nothing = torch.zeros(32, 1, PROMPT, dtype=torch.bool)
    same(BlockELBO(1, block_length=5).views(batch, masks & some, block), expected)
    same(BlockwiseBound(1, "random", "elbo", p_mask_prompt=0.0).views(batch, masks, nothing), expected)
    same(Quadrature(1, masks="count", weight="count").views(batch, masks), expected)
    same(ELBO(1, "bernoulli_count").views(batch, masks, level), expected)
    independent = ELBO(1, "bernoulli").views(batch, masks, level)
    same(IIDRatio(levels="uniform", weight="level").views(batch, masks, level), independent)
    half = torch.full_like(level, 0.5)
    same(Quadrature(1).views(batch, masks), ELBO(1, "bernoulli").views(batch, masks, half))


def test_complementary_views_are_those_of_coupled_scores_without_the_full_one_and_levels() -> None:
    batch, masks = rows_of(Y, 32), all_masks(5)[:, None]
    level = torch.full((32, 1), 0.5, dtype=torch.float64)
    coupled, pair = Coupled(1).views(batch, masks, level), Complementary().views(batch, masks)
    same(Views(coupled.hidden[:, 1:], coupled.weight[:, 1:]), pair)  # 1 / (lambda + 1) / 0.5 = 1
    # A pair at level 1/2 is one of the bound's, too.
    bound = ELBO(2, "bernoulli", complement=True).views(batch, masks, level)
    same(bound, pair)


def test_training_with_everything_hidden_is_weighted_likelihood() -> None:
    batch, table = rows_of(Y, 3), Tabular(5, seed=1)
    ones = torch.ones(3, 5, dtype=torch.float64)
    sft = denoising_views(0.5 * ones, ones.bool(), ones[:, :1], ones[:, :1])
    field = MeanField(0.0).draw(batch, seed=0, iteration=0)
    assert torch.equal(sft.hidden, field.hidden[..., PROMPT:]) and torch.equal(sft.weight, field.weight)
    log_probs = table.view_log_probs(field, batch.canvas_ids)
    scores = MeanField(0.0).reduce(log_probs, field).sum(-1)
    found = denoising_cross_entropy(log_probs, sft.weight, 15)
    torch.testing.assert_close(found, weighted_likelihood(scores, torch.ones(3)).sum() / 15)


# --- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", [5, 3, 1])
def test_left_to_right_is_the_chain_and_the_mean_field_one_step(valid: int) -> None:
    table, batch = Tabular(5, seed=2), rows_of(Y, 1, valid)
    found = table.scores(LeftToRight(), LeftToRight().draw(batch, seed=0, iteration=0), batch.canvas_ids)[0]
    steps = []
    for i in range(valid):
        steps.append(table.log_probs(Y, torch.arange(5) >= i)[i])
    torch.testing.assert_close(found, torch.stack([*steps, *[torch.zeros(()).double()] * (5 - valid)]))
    total = sum(
        float(table.scores(e, e.draw(rows_of(y), seed=0, iteration=0), y[None]).sum().exp())
        for e in (LeftToRight(), MeanField(0.0))
        for y in completions(5)
    )
    assert total == pytest.approx(2, abs=1e-12)  # each is a distribution over completions


@pytest.mark.parametrize(
    ("length", "nodes", "exact"), [(1, 1, True), (2, 1, True), (4, 2, True), (5, 2, False), (5, 3, True)]
)
def test_quadrature_is_exact_with_enough_nodes(length: int, nodes: int, exact: bool) -> None:
    """Independent tokens: 2 N - 1 >= L - 1."""
    table, y, masks = Tabular(length, seed=3), Y[:length], all_masks(length)
    levels, weights = gauss_legendre(nodes)
    assert float(weights.sum()) == pytest.approx(1) and torch.equal(levels, levels.sort().values)
    estimator, found = Quadrature(nodes), 0.0
    batch = rows_of(y, len(masks))
    views = estimator.views(batch, masks[:, None].expand(-1, nodes, -1))  # every node with the same mask
    each = (table.view_log_probs(views, batch.canvas_ids) * views.weight).sum(-1)  # [2^L, N]
    count = masks.sum(-1, keepdim=True)
    found = float((each * levels**count * (1 - levels) ** (length - count)).sum())
    assert (abs(found - table.elbo(y)) < 1e-12) == exact


@pytest.mark.parametrize(("length", "scale"), [(3, 1.327), (5, None), (256, 0.992)])
def test_the_scale_of_exact_counts_weighted_by_level(length: int, scale: float | None) -> None:
    levels, weights = gauss_legendre(3)
    expected = float(sum(w * max(1, int(t * length)) / (t * length) for t, w in zip(levels, weights, strict=True)))
    batch = rows_of(torch.zeros(length, dtype=torch.long), 2)
    views = Quadrature(3, masks="count").draw(batch, seed=0, iteration=0)
    torch.testing.assert_close(views.weight.sum((1, 2)) / length, torch.full((2,), expected).double())
    if scale is not None:
        assert expected == pytest.approx(scale, abs=5e-3)
    views = Quadrature(3, masks="count", weight="count").draw(batch, seed=0, iteration=0)
    torch.testing.assert_close(views.weight.sum((1, 2)) / length, torch.ones(2).double())


@pytest.mark.parametrize(("length", "block", "valid"), [(4, 2, 4), (5, 2, 5), (5, 2, 4), (5, 3, 2), (4, 1, 4)])
def test_the_block_bound_is_the_average_over_orders_within_blocks(length: int, block: int, valid: int) -> None:
    table, y = Tabular(length, seed=5), Y[:length]
    starts = range(0, valid, block)
    groups = [list(itertools.permutations(range(s, min(s + block, valid)))) for s in starts]
    orders = [sum(order, ()) for order in itertools.product(*groups)]
    expected = torch.stack([table.steps(y, order).sum() for order in orders]).mean()
    estimator, found = BlockELBO(1, block), 0.0
    for b, start in enumerate(starts):
        size = min(block, valid - start)
        masks, probability = count_masks(size, 1)
        masks = torch.nn.functional.pad(masks, (start, length - start - size))
        batch = rows_of(y, len(masks), valid)
        views = estimator.views(batch, masks[:, None], torch.full((len(masks), 1), b))
        sums = table.scores(estimator, views, batch.canvas_ids).sum(-1)
        found += float((sums * probability).sum()) / len(starts)
    assert found == pytest.approx(float(expected), abs=1e-12)
    if block == 1:
        chain = table.scores(LeftToRight(), LeftToRight().draw(rows_of(y), seed=0, iteration=0), y[None])
        assert found == pytest.approx(float(chain.sum()), abs=1e-12)


def upper(table: Tabular, y: Tensor, beta: float) -> float:
    """SPG's upper bound in the limit of many views of the whole canvas: count masks, each with its probability."""
    masks, probability = count_masks(len(y), 1)
    weight = probability[:, None] * masks * len(y) / masks.sum(-1, keepdim=True)  # of 1/t, [N, L]
    # The union of all views is the canvas, and the weights of each token add up to 1: only the views are weighted.
    estimator = BlockwiseBound(len(masks), "random", "eubo", beta=beta, p_mask_prompt=0.0)
    batch = rows_of(y)
    views = Views(torch.nn.functional.pad(masks, (PROMPT, 0))[None], weight[None])
    return float(table.scores(estimator, views, batch.canvas_ids).sum())


def test_the_upper_bound_rises_with_its_exponent_and_is_a_bound_at_the_length() -> None:
    violated = {1.0: 0, 1.5: 0, 4.0: 0}
    for seed in range(3):
        inconsistent, consistent = Tabular(4, seed=seed), Tabular(4, joint=joint(4, seed))
        for y in completions(4)[::4]:
            exact = inconsistent.log_likelihood(y)
            bounds = [upper(inconsistent, y, beta) for beta in (1.0, 1.5, 4.0)]
            assert inconsistent.elbo(y) - 1e-12 < bounds[0] < bounds[1] < bounds[2]
            for beta, bound in zip(violated, bounds, strict=True):
                violated[beta] += bound < exact
            assert upper(consistent, y, 4.0) > consistent.log_likelihood(y)
    assert violated[1.0] > 0 and violated[4.0] == 0, violated  # no bound below the length, whatever its name


def test_the_weights_of_coupled_scores() -> None:
    """Half of the mean field, and half of a bound whose two views each hide a token at their own level."""
    table, (masks, level, probability) = Tabular(4, seed=6), iid_masks(4)
    y = Y[:4]
    batch = rows_of(y, len(masks))
    estimator = Coupled(1)
    views = estimator.views(batch, masks[:, None], level[:, None])
    found = (table.scores(estimator, views, batch.canvas_ids).sum(-1) * probability).sum()
    full = table.log_probs(y, torch.ones(4, dtype=torch.bool)).sum()
    # With levels on (0, 1), log p / m of one view and log p / (1 - m) of the other are the bound each.
    assert float(found) == pytest.approx(float(full) / 2 + table.elbo(y), abs=1e-12)


# --- policy gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [LeftToRight(), MeanField(0.0)], ids=name)
def test_policy_gradients_of_exact_estimators_are_those_of_the_expected_reward(estimator: Estimator) -> None:
    table = Tabular(3, seed=7)
    table.logits.requires_grad_()
    ys = completions(3)
    batch = Rows(*[torch.ones(len(ys), PROMPT, dtype=torch.long)] * 2, ys, torch.ones_like(ys), torch.arange(len(ys)))
    scores = table.scores(estimator, estimator.draw(batch, seed=0, iteration=0), ys).sum(-1)
    reward = (ys.sum(-1) % 2).double()
    p = scores.detach().exp()
    exact = torch.autograd.grad((scores.exp() * reward).sum(), table.logits, retain_graph=True)[0]
    advantages = reward - (p * reward).sum()
    loss = surrogate(scores - scores.detach(), scores, advantages, Clip())
    found = torch.autograd.grad((p * loss).sum(), table.logits)[0]
    torch.testing.assert_close(-found, exact, rtol=0, atol=1e-12)


def test_the_surrogate_on_policy_is_reinforce_and_its_mean_gradient_vanishes_for_equal_rewards() -> None:
    scores = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    rewards = torch.linspace(0, 1, 8, dtype=torch.float64)
    for advantages in (rewards - rewards.mean(), rewards - (rewards.sum() - rewards) / 7, torch.zeros(8).double()):
        loss = surrogate(scores - scores.detach(), scores, advantages[:, None], Clip("ppo", 0.0, dual=3.0))
        (found,) = torch.autograd.grad(loss.sum(), scores)
        (expected,) = torch.autograd.grad(weighted_likelihood(scores, advantages[:, None]).sum(), scores)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- what gradients reach, and what they do not -----------------------------------------------------------------------


def test_unhidden_tokens_have_no_score_and_hidden_ones_do_not_tell_their_own_prediction() -> None:
    """Changing a token changes no log-probability of another token in a view that hides it."""
    settings: dict[str, Any] = {"vocab_size": 8, "mask_token_id": 7, "eos_token_id": 1, "pad_token_id": None}
    model = attach_scoring(tiny_llada(**settings, hidden_size=16, initializer_range=0.3, dtype=torch.float64))
    spec, batch = DiffusionSpec.of(model), rows(9)
    for estimator in ESTIMATORS[::3]:
        views = estimator.draw(batch, seed=0, iteration=0)
        other = Rows(
            batch.prompt_ids, batch.prompt_mask, (batch.canvas_ids + 1) % 7, torch.ones_like(batch.valid), batch.row_ids
        )
        one_changed = torch.zeros_like(batch.valid)
        one_changed[:, 2] = True
        ids = torch.cat([batch.prompt_ids, torch.where(one_changed, other.canvas_ids, batch.canvas_ids)], dim=1)
        with torch.no_grad():
            found = [score_views(model, spec, i, batch.attention_mask, views).log_probs for i in (batch.ids, ids)]
        hides = views.hidden[:, :, batch.prompt_ids.shape[1] + 2]  # [B, K]
        changed = found[0] != found[1]
        changed[..., 2] = False
        assert not changed[hides].any()
        shown = ~hides & views.scored.any(-1)
        assert not shown.any() or changed[shown].any()
