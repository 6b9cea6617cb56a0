"""Equality of values and of printed text, as the field has it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rl4dlm.grading.code.compare import equal, same_output

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0), (True, 1), (1.0, True), ("a", "a"), (b"a", b"a"), (None, None), ([1, [2.0]], [1, [2]]),
        ((1, 2), (1, 2)), ({1, 2}, {2, 1}), ({1}, frozenset({1})), ({"a": [1], "b": 2}, {"b": 2, "a": [1]}),
        (NAN, NAN), ([NAN, 1], [NAN, 1]), ({"a": NAN}, {"a": NAN}), (INF, INF), (1 + 2j, 1 + 2j), (2 + 0j, 2),
        (10**400, 10**400), ([], []), ((), ()), ({}, {}),
    ],
)  # fmt: skip
def test_equal_as_in_python(value: Any, expected: Any) -> None:
    assert equal(value, expected) and equal(expected, value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 2), ("1", 1), (1, "1"), ([1], (1,)), ((1,), [1]), ([1, 2], [2, 1]), ([1], [1, 1]), ({1}, [1]), (None, 0),
        (None, False), ("", None), (0.1 + 0.2, 0.3), (NAN, 1.0), (1.0, NAN), (INF, -INF), (INF, 10**400),
        (1.5, 10**400), ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 1}), ({}, []),
        (b"a", "a"), ([[[1]]], [[[2]]]), ("True", True),
    ],
)  # fmt: skip
def test_different_as_in_python(value: Any, expected: Any) -> None:
    assert not equal(value, expected) and not equal(expected, value)


def test_a_tolerance_holds_for_floats_only_and_only_where_it_is_given() -> None:
    assert equal(0.1 + 0.2, 0.3, tolerance=1e-6)
    assert equal([1, (0.1 + 0.2,)], [1, (0.3,)], tolerance=1e-6)
    assert equal({"a": 2}, {"a": 2.0000001}, tolerance=1e-6)
    assert not equal(0.31, 0.3, tolerance=1e-6)
    assert not equal(2, 3, tolerance=5.0)  # integers are exact
    assert not equal("1.0", 1.0, tolerance=1.0)
    assert not equal(INF, 1.0, tolerance=1.0) and not equal(10**400, 1.0, tolerance=1.0)


def test_deep_values_are_different_rather_than_an_error() -> None:
    value: Any = 1
    for _ in range(5_000):
        value = [value]
    assert not equal(value, [value])


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("3\n", "3"), ("3", "3\n\n"), ("1 2 \n3\n", "1 2\n3"), ("  a  \nb", "a\nb"), ("1\r\n2\r\n", "1\n2"),
        ("1.0 2.50", "1 2.5"), ("1e3", "1000"), ("", "\n"), ("-0", "0"), ("0.10", ".1"),
    ],
)  # fmt: skip
def test_output_that_is_the_same(printed: str, expected: str) -> None:
    assert same_output(printed, expected)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("3", "4"), ("1 2", "12"), ("1\n2", "1 2"), ("1\n\n2", "1\n2"), ("a b", "a  b"), ("YES", "Yes"),
        ("0.3000001", "0.3"), ("nan", "NaN"), ("3 extra", "3"), ("", "0"), ("1_000", "1000"),
        ("9" * 70 + ".0", "9" * 70),
    ],
)  # fmt: skip
def test_output_that_differs(printed: str, expected: str) -> None:
    assert not same_output(printed, expected)


def test_numbers_in_output_may_differ_by_a_tolerance() -> None:
    assert same_output("0.3000001 x", "0.3 x", tolerance=1e-6)
    assert same_output("1000000.5", "1000000", tolerance=1e-6)
    assert not same_output("0.31", "0.3", tolerance=1e-6)
    assert not same_output("y", "x", tolerance=1.0)
