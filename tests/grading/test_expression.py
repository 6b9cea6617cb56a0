"""Arithmetic is exact, follows Python where it says so, and costs a bounded amount of work on any text."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from rl4dlm.grading import expression
from rl4dlm.grading.expression import ExpressionError, evaluate, evaluate_like_python

HOSTILE = [
    "9**9**9",
    "9**9**9**9",
    "__import__('os')",
    "().__class__",
    "lambda: 0",
    "1e9",
    "0x10",
    "1_000",
    "9" * 100_000,
    "(" * 100_000 + "1" + ")" * 100_000,
    "-" * 100_000 + "1",
    "1+" * 100_000 + "1",
    "2**" * 1000 + "2",
    "9**9999999999999",
    "(9**40000)*" * 300 + "1",
]
MALFORMED = [
    "",
    " ",
    "()",
    "1 2",
    "(3)(4)",
    "3(4)",
    "1+",
    "*1",
    "1*/2",
    "(1",
    "1)",
    ")(",
    "1..2",
    ".",
    "3,4",
    "3×4",
    "٣+1",
]


Tree = tuple[str, Fraction | None]


def _join(parts: tuple[Tree, str, Tree]) -> Tree:
    """A parenthesised operation and its value, `None` where a division by zero leaves it without one."""
    (left, a), symbol, (right, b) = parts
    text = f"({left}{symbol}{right})"
    if a is None or b is None or (symbol == "/" and b == 0):
        return text, None
    return text, {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[symbol](a, b)


_LEAVES = st.integers(0, 10_000).map(lambda number: (f"{number / 100:.2f}", Fraction(number, 100)))
_TREES = st.recursive(_LEAVES, lambda trees: st.tuples(trees, st.sampled_from("+-*/"), trees).map(_join), max_leaves=8)


@given(_TREES)
def test_value_is_the_rational_number_that_the_tree_denotes(tree: Tree) -> None:
    text, value = tree
    if value is None:
        with pytest.raises(ExpressionError):
            evaluate(text)
    else:
        assert evaluate(text).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14), ("2*3+4", 10), ("8-3-2", 3), ("8/4/2", 1), ("2-(3-4)", 3), ("-2*-3", 6), ("2--3", 5),
        ("-(1+2)", -3),
        ("1/3*3", 1), (".5+5.", Fraction(11, 2)), ("\n1 +\t2\n", 3), ("0.1+0.2", Fraction(3, 10)), ("+-+4", -4),
    ],
)  # fmt: skip
def test_precedence_and_associativity(text: str, value: Fraction | int) -> None:
    assert evaluate(text).value == value


def test_literals_are_the_numbers_as_written() -> None:
    assert evaluate("-(3+4)*3.50").literals == (3, 4, Fraction(7, 2))


@pytest.mark.parametrize("text", [*HOSTILE, *MALFORMED, "2**3", "7//2", "1/0", "1/(2-2)"])
def test_exact_arithmetic_refuses(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(text)


# Values that Python gives these expressions, by its documented rules of precedence, division and floats.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2**3**2", 512), ("-2**2", -4), ("2**-1", 0.5), ("2**-1*4", 2.0), ("(-8)//3", -3), ("7//2*2", 6),
        ("10/4*2", 5.0),
        ("1/3*3", 1.0), ("0.1+0.2", 0.1 + 0.2), ("5.**2", 25.0), ("00+3", 3), ("007.", 7.0), ("09.5", 9.5),
        ("8**2", 64),
        ("(3*4\n+5)", 17), ("3\f+4", 7), ("--3", 3), ("1**99999999999999999999", 1), ("0**0", 1), ("7.5//2", 3.0),
    ],
)  # fmt: skip
def test_like_python_values(text: str, value: float) -> None:
    result = evaluate_like_python(text)
    assert result == value
    assert type(result) is type(value)


def test_like_python_roots_of_negative_numbers_are_complex() -> None:
    assert abs(evaluate_like_python("((-4)**.5)**4") - 16) < 1e-9


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE, *MALFORMED, "007", "1/0", "1//0", "0**-1", "3*4\n+5", "3\v+4", "3\xa0+4", "10.0**400", "...", "3+...",
        "2**99999/3.0",
    ],
)  # fmt: skip
def test_like_python_refuses_what_raises_there_and_what_is_too_large(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate_like_python(text)


def test_nesting_as_deep_as_python_allows() -> None:
    deepest = expression.MAX_DEPTH
    assert evaluate_like_python("(" * deepest + "1" + ")" * deepest) == 1
    with pytest.raises(ExpressionError):
        evaluate_like_python("(" * (deepest + 1) + "1" + ")" * (deepest + 1))


@given(st.text(alphabet="0123456789+-*/(). \n", max_size=40))
def test_any_text_gives_a_number_or_an_expression_error(text: str) -> None:
    for compute in (evaluate, evaluate_like_python):
        try:
            compute(text)
        except ExpressionError:
            continue


@given(st.text(alphabet="0123456789*/() ", max_size=60))
def test_no_integer_exceeds_the_bound(text: str) -> None:
    try:
        value = evaluate_like_python(text)
    except ExpressionError:
        return
    assert not isinstance(value, int) or value.bit_length() <= expression.MAX_BITS
