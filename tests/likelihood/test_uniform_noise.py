"""Estimators of masked denoisers under random tokens: unbiased for the bound of uniform noise, by enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.blockwise import BlockwiseBound
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.quadrature import Quadrature, gauss_legendre
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.uniform import UniformELBO, UniformMeanField, UniformNoise
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from tests.likelihood.tabular import all_masks, count_masks, iid_masks, rows_of

VOCABULARY = 2


class Canvases:
    """A denoiser of canvases of n tokens that is any function of the canvas and of the finished ones before it.

    Args:
        length: tokens of a completion. block: n.
    """

    def __init__(self, length: int, block: int) -> None:
        self.length, self.block = length, block
        self.tables = []  # of each canvas: log D `[finished, noisy, n, V]`
        for first in range(0, length, block):
            shape = (VOCABULARY**first, VOCABULARY**block, block, VOCABULARY)
            generator = torch.Generator().manual_seed(10 * length + first)
            self.tables.append(torch.randn(shape, generator=generator).double().mul(1.5).log_softmax(-1))

    def log_probs(self, x: Tensor, noisy: Tensor) -> Tensor:
        """Of the tokens of x (long `[L]`), as canvases show them (long `[..., L]`): `[..., L]`."""
        each = []
        for number, table in enumerate(self.tables):
            own = slice(number * self.block, (number + 1) * self.block)
            found = table[self._index(x[: own.start])][self._index(noisy[..., own])]
            targets = x[own, None].expand(*found.shape[:-1], 1)
            each.append(found.gather(-1, targets)[..., 0])
        return torch.cat(each, dim=-1)

    def bound(self, x: Tensor) -> float:
        """The sum over canvases of the mean over orders and random tokens, one step after the other."""
        total = 0.0
        for first in range(0, self.length, self.block):
            orders = list(itertools.permutations(range(first, first + self.block)))
            for order, done in itertools.product(orders, range(self.block)):
                shown = torch.zeros(self.length, dtype=torch.bool)
                shown[list(order[:done])] = True
                found = self.log_probs(x, torch.where(shown, x, every_canvas(self.length)))
                total += float(found[:, order[done]].mean()) / len(orders)
        return total

    def expectation(self, views: Views, x: Tensor, probability: Tensor) -> float:
        """Of the sum of the scores, over masks `[N, K]` of these probabilities and over all random tokens."""
        random = every_canvas(self.length)[:, None, None]
        noisy = torch.where(views.hidden[..., -self.length :], random, x)  # [V^L, N, K, L]
        each = (self.log_probs(x, noisy).mean(0) * views.weight).sum(-1)
        return float((each * probability).sum())

    def _index(self, tokens: Tensor) -> Tensor:
        return (tokens * VOCABULARY ** torch.arange(tokens.shape[-1])).sum(-1)


def every_canvas(length: int) -> Tensor:
    """long `[V^L, L]`."""
    return torch.tensor(list(itertools.product(range(VOCABULARY), repeat=length)))


def enumerated(estimator: Any, x: Tensor) -> tuple[Views, Tensor]:
    """The views of all masks of an estimator, and their probabilities `[N, K]`."""
    length = len(x)
    if isinstance(estimator, Quadrature):
        masks, levels = all_masks(length), gauss_legendre(estimator.nodes)[0]
        count = masks.sum(-1, keepdim=True)
        views = estimator.views(rows_of(x, len(masks)), masks[:, None].expand(-1, estimator.nodes, -1))
        return views, levels**count * (1 - levels) ** (length - count)
    if isinstance(estimator, ELBO) and estimator.per_block:
        n = estimator.block_length or length
        parts = [list(zip(*count_masks(n, 1), strict=True))] * (length // n)
        pairs = [
            (torch.cat([m for m, _ in p]), torch.stack([q for _, q in p]).prod()) for p in itertools.product(*parts)
        ]
        masks, probability = torch.stack([m for m, _ in pairs]), torch.stack([p for _, p in pairs])
        level = torch.zeros(len(masks))
    elif getattr(estimator, "form", "") == "bernoulli" or isinstance(estimator, IIDRatio):
        masks, level, probability = iid_masks(length)
    else:
        masks, probability = count_masks(length, int(getattr(estimator, "form", "") != "count_with_zero"))
        level = torch.zeros(len(masks))
    rows = rows_of(x, len(masks))
    if isinstance(estimator, BlockwiseBound):
        views = estimator.views(rows, masks[:, None], torch.zeros(len(masks), 1, rows.prompt_ids.shape[1]).bool())
    else:
        views = estimator.views(rows, masks[:, None], level[:, None])
    return views, probability[:, None]


ESTIMATORS = {
    "level": ELBO(1, "bernoulli"),
    "level pairs": ELBO(2, "bernoulli", complement=True),
    "BGPO": ELBO(1, "count"),
    "pairs": ELBO(2, "count", complement=True),
    "count with zero": ELBO(1, "count_with_zero"),
    "ESPO": ELBO(2, "count_with_zero", complement=True),
    "GDPO": Quadrature(3),
    "SPG, lower": BlockwiseBound(1, "random", "elbo", p_mask_prompt=0.0),
    "independent": IIDRatio(levels="uniform", weight="level"),
}


@pytest.mark.parametrize("name", [*ESTIMATORS, "per canvas", "pairs per canvas"])
@pytest.mark.parametrize(("length", "block"), [(1, 1), (2, 2), (3, 3), (4, 2)])
def test_every_estimator_of_the_masked_bound_is_one_of_this_bound(name: str, length: int, block: int) -> None:
    denoiser = Canvases(length, block)
    for x in (torch.arange(length) % VOCABULARY, torch.ones(length, dtype=torch.long)):
        if name in ESTIMATORS:
            estimator: Any = ESTIMATORS[name]
        else:
            pairs = name.startswith("pairs")
            estimator = ELBO(1 + pairs, "count", pairs, per_block=True, block_length=block)
        views, probability = enumerated(estimator, x)
        found = denoiser.expectation(views, x, probability)
        assert found == pytest.approx(denoiser.bound(x), abs=1e-12)


def test_a_canvas_of_one_token_has_the_mean_over_random_tokens() -> None:
    denoiser, x = Canvases(1, 1), torch.tensor([1])
    expected = float(denoiser.log_probs(x, every_canvas(1)).mean())
    assert denoiser.bound(x) == pytest.approx(expected, abs=1e-12)
    views = UniformNoise(ELBO(1, "count"), VOCABULARY).draw(rows_of(x, 1), seed=0, iteration=0)
    assert views.hidden[0, 0, -1] and views.weight.item() == 1


def drawn(estimator: Any, x: Tensor, count: int, **more: Any) -> Views:
    return estimator.draw(rows_of(x, count, **more), seed=0, iteration=0)


@pytest.mark.parametrize("name", ["ESPO", "pairs", "GDPO"])
def test_draws_have_the_expectation(name: str) -> None:
    denoiser, x, count = Canvases(3, 3), torch.tensor([0, 1, 1]), 40_000
    estimator = UniformNoise(ESTIMATORS[name], VOCABULARY)
    views = drawn(estimator, x, count)
    noisy = views.apply(rows_of(x, count).ids, None)[..., -3:]
    sums = estimator.reduce(denoiser.log_probs(x, noisy), views).sum(-1)
    assert abs(float(sums.mean()) - denoiser.bound(x)) < 4 * float(sums.std()) / count**0.5


def test_the_bound_of_canvases_is_counts_per_canvas_under_random_tokens() -> None:
    x = torch.arange(8) % VOCABULARY
    bound = UniformELBO(vocabulary_size=VOCABULARY, block_length=4, num_views=3, scope="canvas")
    inner = ELBO(3, "count", stratify="none", scope="canvas", per_block=True, block_length=4)
    one, other = (drawn(e, x, 20) for e in (bound, UniformNoise(inner, VOCABULARY)))
    assert torch.equal(one.hidden, other.hidden) and torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.weight.double(), other.weight, rtol=1e-6, atol=0)
    mean_field = UniformMeanField(p_mask_prompt=0.5, vocabulary_size=VOCABULARY)
    assert mean_field.inner == MeanField(0.5) and mean_field.fresh and mean_field.shares_masks


def test_masks_and_weights_are_the_inner_ones_and_true_tokens_are_scored() -> None:
    x = torch.arange(6) % VOCABULARY
    for inner in ESTIMATORS.values():
        views, plain = drawn(UniformNoise(inner, VOCABULARY), x, 200), drawn(inner, x, 200)
        assert torch.equal(views.hidden, plain.hidden) and torch.equal(views.weight, plain.weight)
        assert views.ids is not None and set(views.ids.unique().tolist()) == {0, 1}
        true = (views.ids[..., -6:] == x) & views.hidden[..., -6:]
        assert 0.45 < float(true.sum() / views.hidden[..., -6:].sum()) < 0.55
        assert bool((views.weight[true] > 0).all())


def test_what_was_never_written_counts_for_nothing_and_changes_nothing() -> None:
    """The rollout ended in the first of two canvases: the second one, and the tail of the first, have no weight."""
    x = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    for inner in ESTIMATORS.values():
        views = drawn(UniformNoise(inner, VOCABULARY), x, 50, valid=3)
        assert bool((views.weight[..., 3:] == 0).all()) and bool(views.hidden[..., -5:].all())
    changed = torch.cat([x[:3], 1 - x[3:]])
    estimator = UniformNoise(ELBO(2, "count", True), VOCABULARY)
    one, other = (drawn(estimator, y, 50, valid=3).apply(rows_of(y, 50).ids, None) for y in (x, changed))
    assert torch.equal(one, other)


def test_a_fixed_token_in_place_of_random_ones_is_the_mask_token() -> None:
    model = attach_scoring(tiny_llada())
    spec = DiffusionSpec.of(model)
    canvas = torch.arange(5, 13)
    rows: Rows = rows_of(canvas, 3)
    inner = ELBO(4, "count", True)
    views = UniformNoise(inner, model.config.vocab_size).draw(rows, seed=0, iteration=0)
    assert views.ids is not None
    fixed = Views(views.hidden, views.weight, torch.full_like(views.ids, spec.mask_token_id))
    masked = inner.draw(rows, seed=0, iteration=0)
    found = [score_views(model, spec, rows.ids, rows.attention_mask, v).log_probs for v in (fixed, masked, views)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_cannot_have_random_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="inner=LeftToRight.*written once"):
        UniformNoise(LeftToRight(), VOCABULARY)
    with pytest.raises(ValueError, match="its noise is 'uniform'"):
        UniformNoise(UniformMeanField(vocabulary_size=VOCABULARY), VOCABULARY)
    with pytest.raises(ValueError, match="vocabulary_size=0"):
        UniformNoise(MeanField(), 0)
