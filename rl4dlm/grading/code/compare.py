"""Whether a value, or a printed text, is the expected one.

Owns equality of plain data and the rule for standard output. Values come from a program, so nothing of them is called:
they are plain data, made in this process.
"""

from __future__ import annotations

import cmath
import math
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

_DEEPEST = 200
_LONGEST_NUMBER = 64  # characters of a number in printed text
_RELATIVE = 1e-7  # beside an absolute tolerance, as numpy's `assert_allclose` and EvalPlus have it


def equal(value: Any, expected: Any, *, tolerance: float | None = None) -> bool:
    """Whether two values in plain data are equal, as Python's `==` has it but for two things.

    So 1 equals 1.0 and True, and a list no tuple. But NaN equals NaN: an expected value that was recorded as NaN asks
    for one. And with a tolerance numbers of which one is a float are equal within it, or within 1e-7 of the expected
    one, also inside of lists, tuples and values of dicts (EvalPlus' rule).
    """
    return _equal(value, expected, tolerance, _DEEPEST)


def _equal(value: Any, expected: Any, tolerance: float | None, depth: int) -> bool:
    if depth == 0:
        return False
    if isinstance(expected, float | complex) or isinstance(value, float | complex):
        return _same_number(value, expected, tolerance)
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list if isinstance(expected, list) else tuple)
            and len(value) == len(expected)
            and all(_equal(v, e, tolerance, depth - 1) for v, e in zip(value, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(_equal(value[key], item, tolerance, depth - 1) for key, item in expected.items())
        )
    try:
        return bool(value == expected)
    except RecursionError:
        return False


def _same_number(value: Any, expected: Any, tolerance: float | None) -> bool:
    numbers = int | float | complex | Fraction | Decimal
    if not isinstance(value, numbers) or not isinstance(expected, numbers):
        return False
    if value == expected:
        return True
    try:
        value, expected = (float(n) if isinstance(n, Fraction | Decimal) else n for n in (value, expected))
        if cmath.isnan(value) or cmath.isnan(expected):
            return cmath.isnan(value) and cmath.isnan(expected)
        if tolerance is None or cmath.isinf(value) or cmath.isinf(expected):
            return False
        return abs(value - expected) <= tolerance + _RELATIVE * abs(expected)
    except OverflowError:  # an integer beyond every float
        return False


def same_output(printed: str, expected: str, *, tolerance: float | None = None) -> bool:
    """Whether a program has printed what it should.

    White space at the ends of the text and of each line does not count. A line that differs is still right if it
    consists of as many numbers with the same values, such as 1.50 for 1.5. This is the rule of LiveCodeBench's
    `testing_util.py`, which APPS, TACO and CodeContests are judged by as well. With a tolerance numbers may differ by
    it, absolutely or relative to the expected one, as problems say that accept "an error of at most 1e-6".
    """
    lines, wanted = (text.strip().splitlines() for text in (printed, expected))
    return len(lines) == len(wanted) and all(
        _same_line(line.strip(), other.strip(), tolerance) for line, other in zip(lines, wanted, strict=True)
    )


def _same_line(line: str, expected: str, tolerance: float | None) -> bool:
    if line == expected:
        return True
    words, wanted = line.split(), expected.split()
    if len(words) != len(wanted) or not wanted:
        return False
    if tolerance is None:
        numbers, targets = [_number(word) for word in words], [_number(word) for word in wanted]
        return None not in numbers and None not in targets and numbers == targets
    return all(_near(word, other, tolerance) for word, other in zip(words, wanted, strict=True))


def _near(word: str, expected: str, tolerance: float) -> bool:
    if word == expected:
        return True
    number, target = _number(word), _number(expected)
    if number is None or target is None:
        return False
    try:
        return math.isclose(float(number), float(target), rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:
        return False


def _number(word: str) -> Decimal | None:
    if len(word) > _LONGEST_NUMBER or "_" in word:
        return None
    try:
        number = Decimal(word)
    except InvalidOperation:
        return None
    return None if number.is_nan() else number
