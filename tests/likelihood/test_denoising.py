"""Denoising views: the bound they give is tight where conditionals are exact, and masks have their shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.denoising import denoising_views, hiding, places_of
from rl4dlm.models.spec import DiffusionSpec

SIZE = 4
RELATIVE = (torch.arange(SIZE).double() + 0.5) / SIZE


def exact_conditionals(joint: Tensor, text: tuple[int, ...]) -> dict[tuple[bool, ...], Tensor]:
    """Log-probability of each token given the visible ones, by which tokens are hidden, from a joint distribution."""
    table = {}
    for hidden in itertools.product([False, True], repeat=SIZE):
        found = torch.zeros(SIZE, dtype=torch.float64)
        for place in range(SIZE):
            if hidden[place]:
                given = joint[tuple(slice(None) if h else token for h, token in zip(hidden, text, strict=True))]
                index = sum(hidden[:place])
                found[place] = given.movedim(index, 0)[text[place]].sum().log() - given.sum().log()
        table[hidden] = found
    return table


@pytest.mark.parametrize("tilt", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("complementary", [False, True])
def test_with_exact_conditionals_the_expected_loss_is_the_negative_log_likelihood(
    tilt: float, complementary: bool
) -> None:
    # Exact: all masks at Gauss-Legendre levels, in which the integrand is a polynomial.
    joint = torch.rand((3,) * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    joint = joint / joint.sum()
    text = (2, 0, 1, 2)
    table = exact_conditionals(joint, text)
    masks = torch.tensor(list(table))  # [16, 4]
    scores = torch.stack(list(table.values()))
    uniform, targets = (~masks).double(), torch.ones_like(masks)
    total = 0.0
    for node, share in zip(*np.polynomial.legendre.leggauss(12), strict=True):
        level = torch.full((len(masks), 1), (node + 1) / 2, dtype=torch.float64)
        probability, rate = hiding(level, RELATIVE.expand(len(masks), -1), tilt)
        views = denoising_views(uniform, targets, probability, rate, complementary=complementary)
        assert torch.equal(views.hidden[:, 0], masks)
        chance = torch.where(masks, probability, 1 - probability).prod(-1)
        for k in range(views.hidden.shape[1]):
            found = torch.stack([table[tuple(row.tolist())] for row in views.hidden[:, k]])
            total -= share / 2 * (chance * (views.weight[:, k] * found).sum(-1)).sum().item()
    assert scores.isfinite().all()
    assert total == pytest.approx(-joint[text].log().item(), rel=1e-6)


@pytest.mark.parametrize("tilt", [0.3, 1.0])
def test_a_tilt_hides_later_positions_more_and_as_many_in_all(tilt: float) -> None:
    level = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None]
    probability, _ = hiding(level, RELATIVE[None], tilt)
    torch.testing.assert_close(probability.mean(-1), level[:, 0], rtol=0, atol=1e-15)
    assert (probability >= 0).all() and (probability <= 1).all()
    assert (probability[1:-1].diff(dim=-1) > 0).all(), "by position"
    assert (probability.diff(dim=0) > 0).all(), "by level"
    assert (probability[0] == 0).all() and (probability[-1] == 1).all()


def test_the_rate_is_the_derivative_by_the_level() -> None:
    level = torch.linspace(0.05, 1, 9, dtype=torch.float64)[:, None].expand(-1, SIZE).clone().requires_grad_()
    probability, rate = hiding(level, RELATIVE[None], 0.7)
    (derivative,) = torch.autograd.grad(probability.sum(), level)
    torch.testing.assert_close(rate, derivative, rtol=0, atol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_complementary_views_score_every_target_exactly_once(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(64, 9, dtype=torch.float64, generator=generator)
    targets = torch.rand(64, 9, generator=generator) < 0.7
    level = torch.rand(64, 9, dtype=torch.float64, generator=generator) * 0.8 + 0.1
    views = denoising_views(uniform, targets, *hiding(level), weighted=weighted, complementary=True)
    assert torch.equal(views.hidden.sum(1), targets.long()) and torch.equal(views.scored.sum(1), targets.long())
    if not weighted:
        assert torch.equal(views.weight.sum(1), targets.float())


@pytest.mark.parametrize("origin", ["position_zero", "response"])
def test_places_are_those_of_the_grid(origin: str) -> None:
    spec = DiffusionSpec(2, (1,), attention="block_causal", block_length=4, grid_origin=origin)
    keys = torch.tensor([[False, *[True] * 9], [*[True] * 10]])
    places = places_of(spec, keys, torch.tensor([3, 4]))
    start = {"position_zero": [0, 0], "response": [3, 4]}[origin]
    for row, (pad, length) in enumerate([(1, 9), (0, 10)]):
        for position in range(length):
            slot = (position - start[row]) % 4
            assert places.blocks[row, pad + position] == position - slot
            assert places.relative[row, pad + position] == (slot + 0.5) / 4
