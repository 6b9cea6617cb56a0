"""Views that follow blocks: how they are drawn, and what SPG's bounds make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.blockwise import BOUNDS, MODES, BlockELBO, BlockwiseBound, upper_bound
from rl4dlm.likelihood.views import Rows, Views
from tests.likelihood.tabular import PROMPT, Tabular, completions, count_masks, joint, mask_counts, rows_of
from tests.likelihood.test_estimators import name, rows
from tests.rollout.chi_square import chi_square

BLOCK, CANVAS, VALID = 3, 11, 8  # blocks of 3, 3 and 2 valid tokens, and one behind the end
SIZES = (3, 3, 2)
SHOWN = [BlockwiseBound(3, block_length=BLOCK, p_mask_prompt=0.0), BlockELBO(3, block_length=BLOCK)]

drawn = pytest.mark.parametrize("estimator", SHOWN, ids=name)


def batch_of(count: int, valid: int = VALID, canvas: int = CANVAS) -> Rows:
    return rows_of(torch.arange(canvas) % 3, count, valid)


def draw(estimator: Any, batch: Rows) -> tuple[Tensor, Tensor]:
    """Hidden canvas tokens, bool `[B, K, L]`, and each view's block, long `[B, K]`: what `scored="block"` scores."""
    views = estimator.draw(batch, seed=0, iteration=1)
    hidden = views.hidden[..., batch.prompt_ids.shape[1] :]
    if isinstance(estimator, BlockwiseBound):
        if not estimator.mode.startswith("block"):
            return hidden, torch.zeros(hidden.shape[:2], dtype=torch.long)
        own = replace(estimator, scored="block").draw(batch, seed=0, iteration=1)
        assert torch.equal(own.hidden, views.hidden)
    else:
        own = views
    block = torch.arange(batch.valid.shape[1]) // estimator.block_length
    first, last = (getattr(torch.where(own.scored, block, other), m)(-1) for other, m in ((99, "amin"), (-1, "amax")))
    assert torch.equal(first, last), "tokens of one block"
    return hidden, first


def bound_of(length: int, beta: float, table: Tabular, y: Tensor) -> tuple[float, Tensor]:
    """SPG's upper bound in all count masks, each with its probability, and log-probabilities `[N, L]` with -inf."""
    masks, probability = count_masks(length, 1)
    weight = probability[:, None] * masks * length / masks.sum(-1, keepdim=True)
    views = Views(torch.nn.functional.pad(masks, (PROMPT, 0))[None], weight[None])
    log_probs = table.view_log_probs(views, y[None])
    return float(upper_bound(log_probs, views, beta).sum()), log_probs[0].masked_fill(~masks, -torch.inf)


def scored_views(views: int, **settings: Any) -> tuple[BlockwiseBound, Rows, Views, Tensor]:
    """An estimator, rows of 0 to 8 tokens, their views and log-probabilities that need gradients."""
    estimator, batch = BlockwiseBound(views, block_length=BLOCK, **settings), rows(60)
    drawn = estimator.draw(batch, seed=0, iteration=0)
    noise = torch.randn(drawn.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return estimator, batch, drawn, (-noise.exp() * drawn.scored).requires_grad_()


# --- draws ------------------------------------------------------------------------------------------------------------


@drawn
def test_earlier_blocks_are_shown_and_later_ones_and_what_is_behind_the_end_are_hidden(estimator: Any) -> None:
    hidden, block = draw(estimator, batch_of(300))
    place = torch.arange(CANVAS) // BLOCK - block[..., None]
    end = torch.arange(CANVAS) >= VALID
    assert not hidden[(place < 0) & ~end].any()
    assert hidden[(place > 0) | end].all()
    own = hidden & (place == 0) & ~end
    assert own.any(-1).all() and not own.sum(-1).eq((place == 0).sum(-1)).all()


@drawn
def test_blocks_are_uniform_and_so_are_the_number_of_hidden_tokens_in_them_and_which(estimator: Any) -> None:
    hidden, block = draw(estimator, batch_of(4000))
    for view in range(3):
        chi_square(block[:, view].bincount(minlength=3), torch.ones(3))
        for b, size in enumerate(SIZES):
            masks, probability = count_masks(size, 0)
            probability = probability * masks.any(-1)  # at least one, uniform otherwise
            mine = hidden[block[:, view] == b, view, b * BLOCK : b * BLOCK + size]
            chi_square(mask_counts(mine), probability)
            counts = mine.sum(-1).bincount(minlength=size + 1)
            chi_square(counts, torch.tensor([0] + [1] * size))


def test_a_random_mask_of_the_whole_has_a_uniform_number_of_tokens() -> None:
    estimator = BlockwiseBound(2, "random", block_length=BLOCK, p_mask_prompt=0.0)
    hidden = estimator.draw(batch_of(3000, valid=4), seed=0, iteration=0).hidden[..., PROMPT : PROMPT + 4]
    masks, probability = count_masks(4, 0)
    for view in range(2):
        chi_square(mask_counts(hidden[:, view]), probability * masks.any(-1))


@pytest.mark.parametrize("kind", [BlockwiseBound, BlockELBO])
@pytest.mark.parametrize("views", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("valid", [1, 3, 5, 8, 11])
def test_the_views_of_a_row_take_each_block_equally_often(kind: Any, views: int, valid: int) -> None:
    estimator, blocks = kind(views, block_length=BLOCK), -(valid // -BLOCK)
    _, block = draw(estimator, batch_of(200, valid))
    times = torch.nn.functional.one_hot(block, blocks).sum(1)  # [B, blocks]
    assert int(times.min()) >= views // blocks and int(times.max()) <= -(views // -blocks)


def test_the_published_choice_of_blocks_is_not_uniform_and_repeats_itself() -> None:
    """A permutation of the 8 blocks of the canvas modulo 3: 3/8, 3/8 and 2/8, as recorded for the released code."""
    estimator = BlockwiseBound(3, block_length=2, block_choice="published", p_mask_prompt=0.0)
    _, block = draw(estimator, batch_of(3000, valid=6, canvas=16))
    for view in range(3):
        chi_square(block[:, view].bincount(minlength=3), torch.tensor([3, 3, 2]))
    repeats = (block[:, 0] == block[:, 1]).double().mean()
    # 3 * 2 + 3 * 2 + 2 * 1 of the 8 * 7 pairs of places.
    assert float(repeats) == pytest.approx(14 / 56, abs=5 * (0.25 * 0.75 / 3000) ** 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_a_share_of_the_prompt_and_of_earlier_blocks_is_hidden_besides_and_nothing_else(mode: str) -> None:
    p, batch = 0.3, batch_of(2000)
    estimator = BlockwiseBound(2, mode, block_length=BLOCK, p_mask_prompt=p)
    bare, _ = draw(replace(estimator, p_mask_prompt=0.0), batch)
    hidden, block = draw(estimator, batch)
    earlier = torch.arange(CANVAS) // BLOCK < block[..., None]
    if not mode.startswith("block"):
        earlier[:] = False
    assert torch.equal(hidden & ~earlier, bare & ~earlier)
    prompt = estimator.draw(batch, seed=0, iteration=1).hidden[..., :PROMPT]
    for found in (prompt.flatten(), hidden[earlier]):
        assert not len(found) or abs(float(found.double().mean()) - p) < 5 * (p * (1 - p) / len(found)) ** 0.5
    assert not replace(estimator, p_mask_prompt=0.0).draw(batch, seed=0, iteration=1).hidden[..., :PROMPT].any()


@pytest.mark.parametrize("mode", ["all", "block_all"])
def test_modes_that_draw_no_number_hide_all_tokens(mode: str) -> None:
    estimator = BlockwiseBound(3, mode, block_length=BLOCK, p_mask_prompt=0.0)
    hidden, block = draw(estimator, batch_of(200))
    start = block * BLOCK if mode == "block_all" else torch.zeros_like(block)
    assert torch.equal(hidden, torch.arange(CANVAS) >= start[..., None])


@pytest.mark.parametrize("scored", ["hidden", "block"])
@pytest.mark.parametrize("choice", ["stratified", "published"])
@pytest.mark.parametrize("mode", MODES)
def test_every_view_scores_a_token_and_the_weights_of_a_view_add_up_to_its_share(
    mode: str, choice: str, scored: str
) -> None:
    batch = rows(900)  # every number of valid tokens
    estimator = BlockwiseBound(3, mode, block_length=BLOCK, block_choice=choice, scored=scored)
    views, size = estimator.draw(batch, seed=2, iteration=0), batch.valid.sum(-1).double()
    assert torch.equal(views.scored.any(-1), (size > 0)[:, None].expand(-1, 3))
    torch.testing.assert_close(views.weight.sum(-1), (size / 3)[:, None].expand(-1, 3), rtol=0, atol=1e-12)
    each = torch.where(views.scored, views.weight, 0.0).amax(-1, keepdim=True)
    assert torch.equal(views.weight, each * views.scored), "tokens of a view count the same"


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("mode", MODES)
def test_with_one_view_all_bounds_have_one_gradient(mode: str, beta: float) -> None:
    estimator, batch, views, log_probs = scored_views(1, mode=mode, beta=beta)
    sums = {bound: estimator.reduce_to(bound, log_probs, views).sum(-1) for bound in BOUNDS}
    gradients = {b: torch.autograd.grad(s.sum(), log_probs, retain_graph=True)[0] for b, s in sums.items()}
    assert gradients["elbo"].any()
    for bound in ("eubo", "mix"):
        torch.testing.assert_close(gradients[bound], gradients["elbo"], rtol=1e-12, atol=1e-12)
    # They differ by a constant alone: every scored token has log (1/t) / beta more, and counts |y| / |M| times.
    size, count = batch.valid.sum(-1).double(), views.scored.sum((1, 2))
    extra = torch.where(size > 0, size * (size / count.clamp(min=1)).clamp(min=1).log() / beta, 0.0)
    torch.testing.assert_close(sums["eubo"] - sums["elbo"], extra, rtol=0, atol=1e-10)


@pytest.mark.parametrize("views_per_row", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_weights_of_a_token_in_the_upper_bound_add_up_to_one_share_of_the_length(
    mode: str, views_per_row: int
) -> None:
    estimator, batch, views, log_probs = scored_views(views_per_row, mode=mode, beta=2.0)
    (found,) = torch.autograd.grad(estimator.reduce_to("eubo", log_probs, views).sum(), log_probs)
    union = views.scored.any(1)
    share = batch.valid.sum(-1, keepdim=True).double() / union.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(found.sum(1), share * union, rtol=1e-12, atol=1e-12)
    # Over views, they are proportional to p^beta / t, and so not those of the lower bound.
    each = (views.weight * (2 * log_probs.detach()).exp()) * views.scored
    expected = each / each.sum(1, keepdim=True).clamp(min=1e-300) * (share * union)[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_bounds_differ_where_several_views_hide_a_token_alone() -> None:
    """In the direction of their gradients: a token that one view hides counts the same in both, up to |y| / |U|."""
    estimator, _, views, log_probs = scored_views(2, p_mask_prompt=0.0)
    gradients = [
        torch.autograd.grad(estimator.reduce_to(b, log_probs, views).sum(), log_probs)[0] for b in ("elbo", "eubo")
    ]
    lower, upper = (g / g.sum(1, keepdim=True).clamp(min=1e-300) for g in gradients)
    times = views.scored.sum(1, keepdim=True).expand_as(lower)
    assert (times == 1).any() and (times == 2).any()
    torch.testing.assert_close(lower[times == 1], upper[times == 1], rtol=0, atol=1e-12)
    several = (times == 2) & views.scored
    assert ((lower - upper).abs()[several] > 1e-3).double().mean() > 0.9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [1.0, 1.5, 7.0])
def test_all_bounds_of_a_single_token_are_its_log_probability(mode: str, beta: float) -> None:
    table, batch = Tabular(4, seed=3), batch_of(20, valid=1, canvas=4)
    estimator = BlockwiseBound(3, mode, beta=beta, block_length=2)
    views = estimator.draw(batch, seed=0, iteration=0)
    expected = table.log_probs(batch.canvas_ids, torch.ones(4, dtype=torch.bool)) * (torch.arange(4) == 0)
    for bound in BOUNDS:
        scores = estimator.reduce_to(bound, table.view_log_probs(views, batch.canvas_ids), views)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("consistent", [False, True])
def test_the_upper_bound_rises_from_the_lower_one_to_the_best_order_of_each_token(consistent: bool) -> None:
    table = Tabular(4, joint=joint(4, seed=2)) if consistent else Tabular(4, seed=2)
    betas = (1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 8.0, 64.0, 512.0)
    for y in completions(4)[::7]:
        elbo = table.elbo(y)
        found, log_probs = zip(*[bound_of(4, beta, table, y) for beta in betas], strict=True)
        assert list(found) == sorted(found) and found[0] > elbo
        # The distance from the lower bound is beta times half of a variance, the first cumulant that is left.
        assert found[0] - elbo < 1e-2 and (found[1] - elbo) / (found[0] - elbo) == pytest.approx(100, rel=0.1)
        best = float(log_probs[0].amax(0).sum())
        assert best - 4 * torch.tensor(64.0).log() / 512 < found[-1] < best


def test_without_context_the_upper_bound_is_the_log_likelihood_at_every_exponent() -> None:
    table, y = Tabular(4), torch.tensor([0, 2, 1, 0])
    table.logits = table.logits[-1:].expand_as(table.logits)
    expected = float(table.log_probs(y, torch.ones(4, dtype=torch.bool)).sum())
    for beta in (1e-3, 1.0, 5.0):
        assert bound_of(4, beta, table, y)[0] == pytest.approx(expected, abs=1e-10)


def test_probabilities_that_underflow_are_scored() -> None:
    """exp(-200) is zero in float32, but a token with that probability is not one that no view hides."""
    estimator, batch, views, _ = scored_views(2, beta=1.5)
    log_probs = torch.full(views.weight.shape, -200.0, requires_grad=True)
    scores = estimator.reduce_to("eubo", log_probs * views.scored, views)
    (found,) = torch.autograd.grad(scores.sum(), log_probs)
    union, size = views.scored.any(1), batch.valid.sum(-1)
    assert (scores[union] < -100).all() and (scores[~union] == 0).all()
    torch.testing.assert_close(found.sum((1, 2)), size.float(), rtol=1e-5, atol=1e-5)
