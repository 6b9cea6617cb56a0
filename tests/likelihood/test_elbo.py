"""The evidence lower bound: its forms by enumeration, and that draws follow the distributions enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.iid import IIDRatio
from tests.likelihood.tabular import (
    TOKENS,
    Tabular,
    completions,
    count_masks,
    iid_masks,
    joint,
    mask_counts,
    rows_of,
)
from tests.rollout.chi_square import chi_square

FORMS = [
    ELBO(1, "bernoulli"),
    ELBO(2, "bernoulli", complement=True),
    ELBO(1, "count"),
    ELBO(1, "count_with_zero"),
    ELBO(2, "count_with_zero", complement=True),
    ELBO(2, "count", complement=True),
    ELBO(1, "bernoulli_count"),
    ELBO(2, "bernoulli_count", complement=True),
]


def masks_of(form: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, levels and probabilities of a form."""
    if form.startswith("bernoulli"):
        return iid_masks(length)
    masks, probability = count_masks(length, 0 if form == "count_with_zero" else 1)
    return masks, torch.zeros(len(masks)), probability


def expectation(estimator: ELBO, table: Tabular, y: Tensor, valid: int) -> Tensor:
    """Of the scores `[L]`, over all masks; those behind the end must not matter."""
    masks, level, probability = masks_of(estimator.form, valid)
    mask = torch.nn.functional.pad(masks, (0, len(y) - valid), value=True)
    batch = rows_of(y, len(mask), valid)
    views = estimator.views(batch, mask[:, None], level[:, None])
    return (table.scores(estimator, views, batch.canvas_ids) * probability[:, None]).sum(0)


@pytest.mark.parametrize("estimator", FORMS, ids=str)
@pytest.mark.parametrize(("length", "valid"), [(1, 1), (3, 3), (5, 5), (5, 3), (4, 1)])
def test_every_form_is_the_average_over_orders(estimator: ELBO, length: int, valid: int) -> None:
    for table in (Tabular(length, seed=length), Tabular(length, joint=joint(length, seed=1))):
        y = torch.arange(length) * 2 % TOKENS
        expected = table.elbo(y, valid)
        if estimator.form == "bernoulli_count":
            expected *= valid / (valid + 1)  # a mask without tokens is as likely as any number of them
        found = expectation(estimator, table, y, valid)
        assert float(found.sum()) == pytest.approx(expected, abs=1e-12)
        assert (found[valid:] == 0).all()


def test_it_is_a_bound_and_tight_where_the_order_does_not_matter() -> None:
    inconsistent, consistent = Tabular(3, seed=0), Tabular(3, joint=joint(3, seed=0))
    for y in completions(3):
        assert inconsistent.elbo(y) < inconsistent.log_likelihood(y) - 1e-3
        assert consistent.elbo(y) == pytest.approx(consistent.log_likelihood(y), abs=1e-12)


def test_random_order_has_the_joint_of_a_model_whose_conditionals_fit_together() -> None:
    distribution = joint(4, seed=3)
    table, ys = Tabular(4, joint=distribution), completions(4)
    exact = torch.tensor([table.log_likelihood(y) for y in ys], dtype=torch.float64)
    torch.testing.assert_close(exact, distribution.flatten().log(), rtol=0, atol=1e-12)
    other = Tabular(4, seed=3)
    total = sum(math.exp(other.log_likelihood(y)) for y in ys)
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("stratify", ["none", "views", "rows"])
@pytest.mark.parametrize("form", ["bernoulli", "count", "count_with_zero"])
def test_masks_are_drawn_as_enumerated(form: str, stratify: str) -> None:
    estimator = ELBO(3, form, stratify=stratify)
    length, count = 4, 6000
    views = estimator.draw(rows_of(torch.zeros(length, dtype=torch.long), count), seed=1, iteration=0)
    if form == "bernoulli":
        exact = torch.zeros(2**length, dtype=torch.float64)
        masks, _, probability = iid_masks(length)
        place = (masks * 2 ** torch.arange(length).flip(0)).sum(-1)
        exact.index_add_(0, place, probability)
    else:
        masks, probability = count_masks(length, 0)
        if form == "count":
            probability = probability * (length + 1) / length * (masks.sum(-1) > 0)
        exact = probability
    for view in range(3):
        chi_square(mask_counts(views.hidden[:, view, 2:]), exact)


@pytest.mark.parametrize("form", ["bernoulli", "count_with_zero", "bernoulli_count"])
def test_a_pair_hides_and_scores_every_token_once(form: str) -> None:
    batch = rows_of(torch.zeros(9, dtype=torch.long), 50, valid=7)
    views = ELBO(6, form, complement=True).draw(batch, seed=0, iteration=1)
    pairs = views.scored.unflatten(1, (3, 2))
    assert torch.equal(pairs.sum(2), batch.valid[:, None].expand(-1, 3, -1).long())
    kept = views.hidden[..., 2:9].unflatten(1, (3, 2))
    assert (kept.sum(2) == 1).all()


@pytest.mark.parametrize(("rows_per_batch", "length"), [(1, 8), (2, 8), (3, 8), (4, 8), (6, 6), (2, 256)])
def test_counts_are_uniform_whatever_the_batch(rows_per_batch: int, length: int) -> None:
    """Counts spread over the rows of a batch by rounding to even numbers miss half of them for 2 rows of 256 tokens."""
    estimator = ELBO(1, "count_with_zero", stratify="rows", scope="canvas")
    batch = rows_of(torch.zeros(length, dtype=torch.long), rows_per_batch, first_id=12)
    draws = 600 if length < 100 else 2000
    counts = torch.stack(
        [estimator.draw(batch, seed=0, iteration=n).scored.sum(-1).flatten() for n in range(draws)]
    )  # [draws, B]
    for row in range(rows_per_batch):
        chi_square(counts[:, row].bincount(minlength=length + 1), torch.ones(length + 1))


def test_levels_are_spread_over_views_and_over_rows() -> None:
    length, views = 400, 4
    batch = rows_of(torch.zeros(length, dtype=torch.long), 1000, first_id=77)
    counts = {
        stratify: ELBO(views, "count", stratify=stratify).draw(batch, seed=0, iteration=0).scored.sum(-1)
        for stratify in ("none", "views", "rows")
    }
    for stratify in ("views", "rows"):  # one view in each quarter
        quarter = (counts[stratify] - 1) * views // length
        assert torch.equal(quarter.sort(-1).values, torch.arange(views).expand(1000, -1))
    # The means of 8 rows that follow each other: their standard deviation. A grid has 1 / sqrt(8) = 0.354 of that of
    # independent levels, and no spread has less.
    deviation = {name: float(c[:, :1].view(-1, 8).double().mean(-1).std()) for name, c in counts.items()}
    assert deviation["rows"] < 0.4 * min(deviation["views"], deviation["none"])


def test_a_fixed_count_varies_less_than_independent_tokens() -> None:
    table, y = Tabular(5, seed=4), torch.tensor([0, 1, 2, 0, 1])

    def variance(estimator: ELBO) -> float:
        masks, level, probability = masks_of(estimator.form, 5)
        batch = rows_of(y, len(masks))
        views = estimator.views(batch, masks[:, None], level[:, None])
        sums = table.scores(estimator, views, batch.canvas_ids).sum(-1)
        return float((sums**2 * probability).sum() - (sums * probability).sum() ** 2)

    assert variance(ELBO(1, "count")) < 0.5 * variance(ELBO(1, "bernoulli"))


@pytest.mark.parametrize("complement", [False, True])
def test_the_estimates_of_draws_average_to_the_sequence(complement: bool) -> None:
    estimator = ELBO(6, "count_with_zero", complement=complement)
    table, y = Tabular(4, seed=0), torch.tensor([0, 1, 2, 0])
    batch = rows_of(y, 20)
    views = estimator.draw(batch, seed=0, iteration=0)
    log_probs = table.view_log_probs(views, batch.canvas_ids)
    draws = estimator.per_draw(log_probs, views)
    assert draws.shape == (20, 3 if complement else 6)
    torch.testing.assert_close(draws.mean(-1), estimator.reduce(log_probs, views).sum(-1), rtol=0, atol=1e-12)
    one = ELBO(2 if complement else 1, "count_with_zero", complement=complement)
    for j in range(draws.shape[1]):
        mask = views.hidden[:, j * (2 if complement else 1), 2:]
        alone = table.scores(one, one.views(batch, mask[:, None], torch.zeros(20, 1)), batch.canvas_ids)
        torch.testing.assert_close(draws[:, j], alone.sum(-1), rtol=0, atol=1e-12)


def test_a_model_without_context_has_one_score_at_every_level() -> None:
    table, length = Tabular(4), 4
    table.logits = torch.zeros_like(table.logits)
    batch = rows_of(torch.tensor([0, 1, 2, 0]), 50)
    estimator = ELBO(4, "bernoulli_count", complement=True, level_range=(0.1, 1.0))
    views = estimator.draw(batch, seed=0, iteration=0)
    draws = (table.view_log_probs(views, batch.canvas_ids) * views.weight).sum(-1) * 4
    expected = -length * math.log(TOKENS)
    assert (((draws - expected).abs() < 1e-12) == views.scored.any(-1)).all()
    counts = views.scored.sum(-1)
    assert (counts == 0).any() and torch.equal(counts[:, ::2] + counts[:, 1::2], torch.full((50, 2), length))


def test_independent_tokens_weighted_by_level_are_the_same_bound() -> None:
    table, y = Tabular(4, seed=6), torch.tensor([2, 1, 0, 1])
    estimator = IIDRatio(levels="uniform", weight="level")
    masks, level, probability = iid_masks(4)
    batch = rows_of(y, len(masks))
    views = estimator.views(batch, masks[:, None], level[:, None])
    found = (table.scores(estimator, views, batch.canvas_ids).sum(-1) * probability).sum()
    assert float(found) == pytest.approx(table.elbo(y), abs=1e-12)


# --- pairs of counts --------------------------------------------------------------------------------------------------


def test_a_pair_of_counts_has_the_weight_of_the_completion_in_every_draw() -> None:
    """Also where the first view hides everything: the second one then does so, too."""
    batch = rows_of(torch.zeros(9, dtype=torch.long), 400, valid=4)
    views = ELBO(6, "count", complement=True).draw(batch, seed=0, iteration=1)
    total = views.weight.sum(-1).unflatten(1, (3, 2)).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 4 / 3), rtol=0, atol=1e-12)
    first, second = views.scored[..., :4].unflatten(1, (3, 2)).unbind(2)
    everything = first.all(-1)
    assert 0.2 < float(everything.float().mean()) < 0.3  # one count of four
    assert torch.equal(second, torch.where(everything[..., None], first, ~first))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_pairs_of_counts_vary_less_than_those_that_may_hide_nothing(length: int) -> None:
    """The mean over completions of the exact variance; for a single one either may be smaller."""
    table, found = Tabular(length, seed=length), {"count": 0.0, "count_with_zero": 0.0}
    for form in found:
        estimator = ELBO(2, form, complement=True)
        masks, level, probability = masks_of(form, length)
        for y in completions(length):
            batch = rows_of(y, len(masks))
            views = estimator.views(batch, masks[:, None], level[:, None])
            sums = table.scores(estimator, views, batch.canvas_ids).sum(-1)
            found[form] += float((sums**2 * probability).sum() - (sums * probability).sum() ** 2)
    assert found["count"] < 0.8 * found["count_with_zero"], found


# --- blocks -----------------------------------------------------------------------------------------------------------

BLOCK = 2


def block_log_probs(table: Tabular, hidden: Tensor, y: Tensor) -> Tensor:
    """Of y `[B, L]` in views `[B, K, L]`: each block given its own tokens as shown, and those before it, which are."""
    block = torch.arange(table.length) // BLOCK
    each = [
        table.log_probs(y[:, None], torch.where(block == b, hidden, block > b)) * (block == b)
        for b in range(int(block[-1]) + 1)
    ]
    return torch.stack(each).sum(0)


def block_bound(table: Tabular, y: Tensor, valid: int) -> float:
    """sum over blocks of the mean over orders of the block's tokens, given what is before it."""
    total = 0.0
    for first in range(0, valid, BLOCK):
        own = list(range(first, min(first + BLOCK, valid)))
        orders = list(itertools.permutations(own))
        for order in orders:
            steps = table.steps(y, (*range(first), *order))
            total += float(steps[own].sum()) / len(orders)
    return total


def block_masks(valid: int, least: int) -> Iterator[tuple[Tensor, float]]:
    """Masks `[valid]` of a uniform count in each block and a uniform subset of it, and their probabilities."""
    sizes = [min(BLOCK, valid - first) for first in range(0, valid, BLOCK)]
    each = [list(zip(*(x.tolist() for x in count_masks(size, least)), strict=True)) for size in sizes]
    for parts in itertools.product(*each):
        yield torch.tensor([hide for mask, _ in parts for hide in mask]), math.prod(p for _, p in parts)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("form", ["count", "count_with_zero"])
@pytest.mark.parametrize(("length", "valid"), [(4, 4), (5, 5), (4, 3)])
def test_counts_of_blocks_and_of_the_canvas_are_unbiased_for_the_sum_of_block_bounds(
    form: str, complement: bool, length: int, valid: int
) -> None:
    table, y = Tabular(length, seed=5), torch.arange(length) * 2 % TOKENS
    expected, views = block_bound(table, y, valid), 2 if complement else 1
    masks, _, probability = masks_of(form, valid)
    in_blocks = list(block_masks(valid, 0 if form == "count_with_zero" else 1))
    for estimator, mask, p in (
        (ELBO(views, form, complement), masks, probability),
        (
            ELBO(views, form, complement, per_block=True, block_length=BLOCK),
            torch.stack([m for m, _ in in_blocks]),
            torch.tensor([p for _, p in in_blocks], dtype=torch.float64),
        ),
    ):
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        batch = rows_of(y, len(mask), valid)
        hidden = torch.nn.functional.pad(mask, (0, length - valid), value=True)
        shown = estimator.views(batch, hidden[:, None], torch.zeros(len(mask), 1))
        log_probs = block_log_probs(table, shown.hidden[..., 2:], batch.canvas_ids)
        sums = (log_probs * shown.weight).sum((1, 2))
        assert float((sums * p).sum()) == pytest.approx(expected, abs=1e-12)


def test_counts_of_blocks_vary_less_than_one_of_the_canvas() -> None:
    table, y, length = Tabular(4, seed=5), torch.tensor([0, 2, 1, 0]), 4
    batch = rows_of(y, 4000)
    found = []
    for more in ({}, {"per_block": True, "block_length": BLOCK}):
        views = ELBO(1, "count", **more).draw(batch, seed=0, iteration=0)
        log_probs = block_log_probs(table, views.hidden[..., -length:], batch.canvas_ids)
        found.append(float((log_probs * views.weight).sum((1, 2)).var()))
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("stratify", ["none", "views", "rows"])
def test_counts_are_uniform_in_every_block_and_in_the_short_ones_of_the_grid(stratify: str) -> None:
    """A prompt of two tokens and blocks of three from position zero: blocks of 1, 3, 3 and, at the end, 2 tokens."""
    estimator = ELBO(
        2, "count", stratify=stratify, per_block=True, block_length=3, block_origin="position_zero", scope="canvas"
    )
    hidden = estimator.draw(rows_of(torch.zeros(9, dtype=torch.long), 3000), seed=4, iteration=0).hidden[..., 2:]
    for first, size in ((0, 1), (1, 3), (4, 3), (7, 2)):
        part = hidden[..., first : first + size]
        assert part.any(-1).all(), "every block has something to predict"
        for view in range(2):
            counts = part[:, view].sum(-1)
            chi_square(counts.bincount(minlength=size + 1)[1:], torch.ones(size))
            if size == 3:  # and each subset of a size is as likely
                chi_square(mask_counts(part[:, view][counts == 2])[[3, 5, 6]], torch.ones(3))
