"""A likelihood by strata: each token once beside the others, the mean field as one of them, and no bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.strata import Strata
from tests.likelihood.tabular import TOKENS, Tabular, rows_of
from tests.likelihood.test_estimators import rows


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_strata_are_of_equal_size_and_hold_each_token_once(count: int) -> None:
    batch, estimator = rows(), Strata(count)
    views = estimator.draw(batch, seed=1, iteration=0)
    assert views.hidden.shape[1] == count and torch.equal(views.scored.sum(1), batch.valid.long())
    size = views.scored.sum(-1)
    assert (size.amax(-1) - size.amin(-1) <= 1).all()
    other = estimator.draw(batch, seed=1, iteration=1)
    assert torch.equal(other.hidden, views.hidden) == (count == 1) == (not estimator.fresh)
    assert estimator.reweighted == (count > 1)


def test_one_stratum_is_the_mean_field() -> None:
    batch = rows()
    found, expected = (e.draw(batch, seed=0, iteration=0) for e in (Strata(1), MeanField(0.0)))
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.weight.float(), expected.weight)


def test_the_sum_is_no_bound_of_the_likelihood() -> None:
    """Two tokens that are always equal are certain beside each other; apart they are not."""
    joint = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    joint[0, 0] = joint[1, 1] = 0.5
    table, y = Tabular(2, joint=joint + 1e-12), torch.zeros(2, dtype=torch.long)
    batch = rows_of(y)
    each = {
        q: float(table.scores(e, e.draw(batch, seed=0, iteration=0), y[None]).sum())
        for q, e in ((1, Strata(1)), (2, Strata(2)))
    }
    assert each[1] == pytest.approx(2 * math.log(0.5), abs=1e-9)
    assert each[2] == pytest.approx(0.0, abs=1e-9) and each[2] > math.log(0.5)
    total = sum(
        math.exp(float(table.scores(Strata(2), Strata(2).draw(batch, seed=0, iteration=0), z[None]).sum()))
        for z in map(torch.tensor, itertools.product(range(TOKENS), repeat=2))
    )
    assert total > 1.5, "not a distribution over completions"


def test_a_bad_setting_is_refused() -> None:
    for settings, said in (({"count": 0}, "count=0"), ({"p_mask_prompt": 1.5}, "p_mask_prompt=1.5")):
        with pytest.raises(ValueError, match=said):
            Strata(**settings)
