"""The Wilson interval against published values and against what it is: the rates that a score test does not reject."""

from __future__ import annotations

from math import sqrt

import pytest
from hypothesis import given, strategies as st

from rl4dlm.evaluation import wilson_interval


# Newcombe, Two-sided confidence intervals for the single proportion, Statist. Med. 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(data=st.data(), trials=st.integers(1, 2000))
def test_the_ends_are_where_the_score_test_turns(data, trials):
    successes = data.draw(st.integers(0, 4 * trials)) / 4
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes / trials - end) / sqrt(end * (1 - end) / trials) == pytest.approx(1.959964, abs=1e-4)


def test_certainty_costs_width():
    narrow, wide = wilson_interval(3, 10, confidence=0.5), wilson_interval(3, 10, confidence=0.99)
    assert wide[0] < narrow[0] < 0.3 < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1, 0), "trials=0"), ((5, 4), "successes=5"), ((-1, 4), "successes=-1"), ((1, 4, 1.0), "confidence=1.0")],
)
def test_bad_numbers_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        wilson_interval(*arguments)
