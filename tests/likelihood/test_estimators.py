"""What every estimator that hides tokens behind a mask may hide and score, and what that may depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rl4dlm.likelihood.blockwise import BlockELBO, BlockwiseBound
from rl4dlm.likelihood.complementary import Complementary
from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.quadrature import Quadrature
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.strata import Strata
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from tests.likelihood.tabular import Tabular, rows_of
from tests.models.float64 import exactly_float64

ESTIMATORS: list[Estimator] = [
    MeanField(0.3),
    Coupled(),
    Coupled(pairs=2),
    Complementary(pairs=2),
    IIDRatio(num_iterations=4),
    IIDRatio(levels="uniform", level_range=(0.1, 0.9), num_views=3, weight="level"),
    ELBO(form="bernoulli"),
    ELBO(form="bernoulli", complement=True, stratify="none"),
    ELBO(form="count"),
    ELBO(form="count", stratify="rows"),
    ELBO(form="count_with_zero", complement=True, stratify="rows"),
    ELBO(form="count", complement=True),
    ELBO(form="count", per_block=True, block_length=3),
    ELBO(form="count", complement=True, stratify="none", per_block=True, block_length=3, block_origin="position_zero"),
    ELBO(form="bernoulli_count", complement=True, level_range=(0.1, 1.0)),
    Quadrature(),
    Quadrature(masks="count", masks_per_node=2),
    Quadrature(masks="count", weight="count"),
    BlockwiseBound(block_length=3),
    BlockwiseBound(block_length=3, num_views=3, block_choice="published", bound="eubo"),
    BlockwiseBound(block_length=3, mode="block_all", scored="block", bound="elbo"),
    BlockwiseBound(mode="random", bound="elbo", p_mask_prompt=0.0),
    BlockwiseBound(mode="all"),
    BlockELBO(block_length=3),
    Strata(3),
    Strata(20, p_mask_prompt=0.3),
    LeftToRight(),
    LeftToRight(tokens_per_view=3),
    LeftToRight(within="block", block_length=3),
    LeftToRight(tokens_per_view=2, within="block", block_length=4, block_origin="position_zero"),
]


def name(estimator: Estimator) -> str:
    return str(estimator).replace(" ", "")


each = pytest.mark.parametrize("estimator", ESTIMATORS, ids=name)


def rows(count: int = 40, canvas: int = 8, width: int = 6) -> Rows:
    """Rows with 0 to 8 valid tokens after prompts of 1 to 4 tokens."""
    ids = torch.arange(count)
    prompt = torch.arange(width) >= width - 1 - ids[:, None] % 4
    tokens = (ids[:, None] * 3 + torch.arange(canvas)) % 7
    valid = torch.arange(canvas) < ids[:, None] % 9
    return Rows(prompt.long() * 5, prompt, tokens, valid, ids + 2**40)


@each
@pytest.mark.parametrize("scope", ["valid", "canvas"])
def test_what_is_scored_is_hidden_and_in_scope(estimator: Any, scope: str) -> None:
    estimator, batch = replace(estimator, scope=scope), rows()
    views = estimator.draw(batch, seed=1, iteration=2)
    width = batch.prompt_ids.shape[1]
    assert not views.hidden[:, :, :width][~batch.prompt_mask[:, None].expand(-1, views.hidden.shape[1], -1)].any()
    assert (views.hidden[:, :, width:] | ~views.scored).all()
    within = batch.valid if scope == "valid" else torch.ones_like(batch.valid)
    assert (within[:, None] | ~views.scored).all()
    assert views.hidden[:, :, width:][~within[:, None].expand_as(views.scored)].all()
    assert views.weight.isfinite().all() and (views.weight >= 0).all()


@each
def test_rows_of_no_one_and_all_tokens_have_finite_scores_and_gradients(estimator: Estimator) -> None:
    batch = rows()
    views = estimator.draw(batch, seed=1, iteration=0)
    log_probs = torch.full(views.weight.shape, -1.5, requires_grad=True)
    scores = estimator.reduce(log_probs * views.scored, views)
    scores.sum().backward()
    assert scores.dtype == torch.float32 and scores.shape == batch.valid.shape and scores.isfinite().all()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()
    assert (scores[batch.valid.sum(-1) == 0] == 0).all()
    assert (log_probs.grad[~views.scored] == 0).all()


@each
def test_a_row_has_the_same_views_in_every_batch(estimator: Estimator, global_rng_untouched: None) -> None:
    batch = rows()
    views = estimator.draw(batch, seed=3, iteration=1)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    for part in (order, slice(3, 4), slice(5, 19)):
        other = estimator.draw(batch[part], seed=3, iteration=1)
        assert torch.equal(other.hidden, views.hidden[part]) and torch.equal(other.weight, views.weight[part])


@pytest.mark.parametrize(
    "estimator",
    # The published choice of blocks permutes those of the canvas, so that its length matters.
    [e for e in ESTIMATORS if getattr(e, "block_choice", None) != "published"],
    ids=name,
)
def test_padding_and_what_is_behind_the_end_change_nothing(estimator: Estimator) -> None:
    batch = rows()
    batch.valid[:, 6:] = False
    views = estimator.draw(batch, seed=3, iteration=1)
    short = Rows(
        batch.prompt_ids[:, 2:], batch.prompt_mask[:, 2:], batch.canvas_ids[:, :6], batch.valid[:, :6], batch.row_ids
    )
    narrow = estimator.draw(short, seed=3, iteration=1)
    count = narrow.hidden.shape[1]  # a view per token: fewer for a smaller canvas
    assert torch.equal(views.hidden[:, :count, 2:12], narrow.hidden[:, :, :10])
    assert torch.equal(views.weight[:, :count, :6], narrow.weight) and (views.weight[:, count:] == 0).all()


@each
def test_seed_row_and_iteration_matter_where_views_are_fresh(estimator: Estimator) -> None:
    batch = rows()
    views = estimator.draw(batch, seed=3, iteration=1)
    other_rows = Rows(batch.prompt_ids, batch.prompt_mask, batch.canvas_ids, batch.valid, batch.row_ids + 1000)
    others = [
        estimator.draw(batch, seed=4, iteration=1),
        estimator.draw(batch, seed=3, iteration=2),
        estimator.draw(other_rows, seed=3, iteration=1),
    ]
    for other in others:
        assert torch.equal(other.hidden, views.hidden) != estimator.fresh


@each
def test_the_weights_of_a_token_add_up_to_one_on_average_unless_it_says_that_they_do_not(estimator: Any) -> None:
    count, valid = 20_000, 5
    batch = rows_of(torch.zeros(6, dtype=torch.long), count, valid)
    total = estimator.draw(batch, seed=0, iteration=1).weight.sum(1)  # [B, L]
    assert (total[:, valid:] == 0).all()
    # Rows spread over levels vary less than independent ones, so that the bound holds for them all the more.
    deviation = (total.mean(0) - 1).abs()[:valid] / (total.std(0)[:valid] / count**0.5 + 1e-12)
    # These count every token once, but levels not evenly, or none: that reweights, too.
    reweighted = estimator.reweighted and not isinstance(estimator, Complementary | Strata)
    assert bool((deviation < 5).all()) != reweighted, total.mean(0)


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if not isinstance(e, LeftToRight)], ids=name)
def test_tokens_behind_the_end_matter_in_scope_canvas_alone(estimator: Any) -> None:
    table, y = Tabular(5, seed=2), torch.tensor([0, 2, 1, 1, 1])
    other = torch.tensor([0, 2, 1, 0, 2])
    for scope, same in (("valid", True), ("canvas", False)):
        estimator = replace(estimator, scope=scope)
        scores = []
        for tokens in (y, other):
            batch = rows_of(tokens, 30, valid=3)
            views = estimator.draw(batch, seed=0, iteration=0)
            scores.append(table.scores(estimator, views, batch.canvas_ids).sum(-1))
        assert torch.equal(*scores) == same


@pytest.mark.parametrize(
    "estimator",
    [
        Coupled(),
        ELBO(num_views=8, form="count_with_zero", complement=True),
        Quadrature(nodes=4),
        BlockwiseBound(num_views=4, block_length=3, p_mask_prompt=0.5),
        BlockELBO(num_views=3, block_length=3),
        LeftToRight(),
    ],
    ids=name,
)
def test_one_view_at_a_time_gives_the_same_gradients(estimator: Estimator) -> None:
    sizes: Any = {"vocab_size": 8, "mask_token_id": 7, "eos_token_id": 1, "pad_token_id": None}
    model = attach_scoring(exactly_float64(tiny_llada(**sizes, dtype=torch.float64)))
    batch = rows(9)
    views = estimator.draw(batch, seed=0, iteration=0)
    found = []
    for one_view in (False, True):
        scored = score_views(model, DiffusionSpec.of(model), batch.ids, batch.attention_mask, views, one_view=one_view)
        scores = estimator.reduce(scored.log_probs, views).sum(-1)
        loss = (scores / 8).exp().sum()  # not linear in the scores
        found.append((scores, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    for together, in_turn in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(together, in_turn, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Coupled, {"pairs": -1}, "pairs=-1"),
        (Coupled, {"level_range": (0.8, 0.2)}, "level_range"),
        (Coupled, {"level_range": (0.0, 0.5)}, "level_range"),
        (Coupled, {"scope": "all"}, "scope='all'.*valid, canvas"),
        (IIDRatio, {"levels": "cosine"}, "levels='cosine'.*structured, uniform"),
        (IIDRatio, {"weight": "two"}, "weight='two'"),
        (IIDRatio, {"num_iterations": 0}, "num_iterations=0"),
        (ELBO, {"form": "counts"}, "form='counts'.*count_with_zero"),
        (ELBO, {"stratify": "batch"}, "stratify='batch'.*none, views, rows"),
        (ELBO, {"per_block": True}, "block_length=None"),
        (ELBO, {"per_block": True, "block_length": 4, "form": "bernoulli"}, "per_block=True.*form='bernoulli'"),
        (ELBO, {"block_length": 4}, "block_length=4.*no effect with per_block=False"),
        (ELBO, {"per_block": True, "block_length": 4, "block_origin": "prompt"}, "block_origin='prompt'"),
        (ELBO, {"form": "bernoulli", "complement": True, "num_views": 3}, "num_views=3"),
        (ELBO, {"num_views": True}, "num_views=True"),
        (Quadrature, {"nodes": 0}, "nodes=0"),
        (Quadrature, {"weight": "count"}, "weight='count'.*bernoulli"),
        (BlockwiseBound, {"mode": "blocks"}, "mode='blocks'"),
        (BlockwiseBound, {"bound": "zero"}, "bound='zero'.*elbo, eubo, mix"),
        (BlockwiseBound, {"beta": 0.5}, "beta=0.5"),
        (BlockwiseBound, {"mix_weight": 1.5}, "mix_weight=1.5"),
        (BlockwiseBound, {"p_mask_prompt": -0.1}, "p_mask_prompt=-0.1"),
        (BlockwiseBound, {"block_choice": "random"}, "block_choice='random'"),
        (BlockwiseBound, {"scored": "all"}, "scored='all'"),
        (BlockELBO, {"block_length": 0}, "block_length=0"),
        (LeftToRight, {"tokens_per_view": 1.5}, "tokens_per_view=1.5"),
        (LeftToRight, {"within": "row"}, "within='row'.*canvas, block"),
        (LeftToRight, {"within": "block"}, "block_length=None"),
        (LeftToRight, {"block_length": 4}, "block_length=4.*no effect with within='canvas'"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
