"""Complementary views and context-adaptive weights."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.likelihood.complementary import Complementary, check_context, context_weights
from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.views import Rows


def rows(count: int = 3, length: int = 6) -> Rows:
    valid = torch.arange(length) < torch.tensor([length, 4, 1])[:count, None]
    return Rows(
        torch.full((count, 2), 9),
        torch.ones(count, 2),
        torch.randint(5, 9, (count, length), generator=torch.Generator().manual_seed(0)),
        valid,
        torch.arange(count) + 7,
    )


@pytest.mark.parametrize("scope", ["valid", "canvas"])
@pytest.mark.parametrize("pairs", [1, 2])
def test_the_views_of_a_pair_hide_every_token_once(pairs: int, scope: str) -> None:
    here = rows()
    views = Complementary(pairs=pairs, scope=scope).draw(here, seed=0, iteration=1)
    within = here.valid if scope == "valid" else torch.ones_like(here.valid)
    scored = views.scored.unflatten(1, (pairs, 2))
    assert torch.equal(scored.sum(2), within[:, None].long().expand(-1, pairs, -1))
    assert torch.equal(views.hidden[:, :, 2:] & within[:, None], views.scored), "what is hidden is scored"
    assert not views.hidden[:, :, :2].any(), "prompts are shown"
    log_probs = -torch.rand(len(here), 2 * pairs, 6, dtype=torch.float64)
    ones = Complementary(pairs=pairs, scope=scope).reduce(torch.ones_like(log_probs), views)
    torch.testing.assert_close(ones, within.double())


def test_levels_are_uniform_and_masks_are_keyed_by_row_and_pass() -> None:
    canvas = torch.zeros(400, 40, dtype=torch.long)
    many = Rows(canvas[:, :1], torch.ones(400, 1), canvas, torch.ones(400, 40), torch.arange(400))
    estimator = Complementary()
    first = estimator.draw(many, seed=0, iteration=0).scored[:, 0].double().mean(-1)
    assert abs(first.mean() - 0.5) < 0.05 and abs(first.var() - 1 / 12) < 0.02
    assert not torch.equal(first, estimator.draw(many, seed=0, iteration=1).scored[:, 0].double().mean(-1))
    some = torch.tensor([3, 17])
    torch.testing.assert_close(
        estimator.draw(many[some], seed=0, iteration=0).hidden, estimator.draw(many, seed=0, iteration=0).hidden[some]
    )


def test_it_is_coupled_without_the_full_view_and_without_levels() -> None:
    here = rows()
    mask, level = torch.rand(3, 1, 6) < 0.5, torch.full((3, 1), 0.5)
    coupled, ours = Coupled().views(here, mask, level), Complementary().views(here, mask)
    log_probs = -torch.rand(3, 3, 6, dtype=torch.float64)
    pair = Coupled().reduce(log_probs, coupled) - 0.5 * log_probs[:, 0] * here.valid
    torch.testing.assert_close(pair, Complementary().reduce(log_probs[:, 1:], ours))  # 1 / 2 / level = 1


def test_context_weights_by_their_definition() -> None:
    visible = torch.tensor([True, False, False, True, True, False])
    for p in (0.1, 0.5, 1.0):
        expected = [
            sum(0.5 * p * (1 - p) ** (abs(k - j) - 1) for j in range(6) if visible[j] and j != k) for k in range(6)
        ]
        assert context_weights(visible, p).tolist() == pytest.approx(expected)
    assert not context_weights(torch.zeros(2, 5, dtype=torch.bool), 0.1).any()
    alone = torch.ones(801, dtype=torch.bool)
    alone[400] = False
    assert context_weights(alone, 0.1)[400].item() == pytest.approx(1)
    one = context_weights(torch.arange(9) == 4, 0.3)
    torch.testing.assert_close(one, one.flip(0))
    assert (one[6] / one[5]).item() == pytest.approx(0.7)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"pairs=0"):
        Complementary(pairs=0)
    with pytest.raises(ValueError, match="scope='all'"):
        Complementary(scope="all")
    for p in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"cart_p={p}"):
            check_context("cart_p", p)
