"""Area over speed and AUP against what they are defined as."""

from __future__ import annotations

from math import exp

import pytest
from hypothesis import given, strategies as st

from rl4dlm.evaluation import Speed, area, aup

RATES = st.lists(st.tuples(st.floats(0.5, 64), st.floats(0, 1)), min_size=1, max_size=6, unique_by=lambda p: p[0])


@given(points=RATES)
def test_the_area_lies_between_the_rates(points):
    assert min(rate for _, rate in points) - 1e-9 <= area(points) <= max(rate for _, rate in points) + 1e-9


def test_the_area_is_the_mean_accuracy_over_octaves_of_speed():
    assert area([(1, 0.5), (2, 0.5), (4, 0.5), (8, 0.5)]) == pytest.approx(0.5)
    assert area([(1, 1.0), (4, 0.0)]) == pytest.approx(0.5)
    assert area([(1, 1.0), (2, 0.0), (8, 0.0)]) == pytest.approx(0.5 / 3)


def test_aup_by_hand():
    # The first point counts as if everything up to its speed were as accurate; of the others each trapezoid, weighted.
    assert aup([(1.0, 0.8)]) == pytest.approx(80)
    weight = exp(-3 * (1 - 0.78 / 0.8))
    assert aup([(1, 0.8), (3, 0.78)]) == pytest.approx(80 + 2 * (80 + 78 * weight) / 2)
    assert aup([(3, 0.78), (1, 0.8)]) == aup([(1, 0.8), (3, 0.78)])
    # What lies more than five points below the first is left out, and the others go on beside it.
    assert aup([(1, 0.8), (3, 0.74)]) == pytest.approx(80)
    assert aup([(1, 0.8), (2, 0.74), (3, 0.75)]) == pytest.approx(80 + 2 * (80 + 75 * exp(-3 * (1 - 75 / 80))) / 2)
    # Another method's best lowers it, and what is better than the best is not raised.
    lower = aup([(1, 0.8), (3, 0.8)], best=0.9)
    assert lower == pytest.approx(80 + 2 * 80 * exp(-3 * (1 - 80 / 90)))
    assert aup([(1, 0.8), (3, 0.9)], best=0.5) == pytest.approx(80 + 2 * (80 + 90) / 2)
    assert aup([(1, 0.0), (2, 0.0)]) == 0
    # Without loss it is the plain area under accuracy over tokens per forward.
    assert aup([(1, 0.6), (2, 0.6), (5.58, 0.6)]) == pytest.approx(60 * 5.58)


def test_what_is_refused():
    for points in ([], [(0, 0.5)], [(1, 1.5)], [(float("inf"), 0.5)]):
        with pytest.raises(ValueError, match=r"points is empty|is not allowed"):
            Speed.of(points)
    with pytest.raises(ValueError, match="best=50"):
        aup([(1, 0.5)], best=50)
