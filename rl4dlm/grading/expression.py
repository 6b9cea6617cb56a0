"""Arithmetic written by a model, computed by a parser that knows nothing but arithmetic.

Owns reading an expression and the bounds on what that may cost. Nothing here evaluates text as code: an expression is
cut into numbers, operators and parentheses, and anything else is an error. It does not know what the numbers are for.

`evaluate` is the arithmetic a task means: + - * / with exact rationals. `evaluate_like_python` is what d1's reward
computes (arXiv 2504.12216), which passes text through a character filter to Python's evaluator: `**`, `//`, floats and
all.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

MAX_CHARACTERS = 4096
MAX_DEPTH = 200  # open parentheses; Python's own limit
MAX_DIGITS = 64  # of a number in `evaluate`, which so bounds every value: there are no powers
MAX_BITS = 1 << 17  # of an integer in `evaluate_like_python`
MAX_WORK = 1 << 20  # bits of all its intermediate results together

_TOKEN = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)|(?P<operator>\*\*|//|[-+*/()])|(?P<space>\s)", re.ASCII)
_PREFIX = {"+": "+x", "-": "-x"}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "+x": 3, "-x": 3, "**": 4}
_FUNCTION: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "+x": operator.pos, "-x": operator.neg, "**": operator.pow,
}  # fmt: skip


class ExpressionError(ValueError):
    """The text is not an expression, or costs more than the bounds allow."""


class Evaluation(NamedTuple):
    """An expression's value and the numbers it is written with, in order, both exact."""

    value: Fraction
    literals: tuple[Fraction, ...]


def evaluate(text: str) -> Evaluation:
    """The exact value of an expression of integers, decimals, + - * / and parentheses.

    Raises:
        ExpressionError: anything else, a division by zero, more than `MAX_CHARACTERS`, `MAX_DEPTH` or `MAX_DIGITS`.
    """
    literals: list[Fraction] = []

    def number(token: str) -> Fraction:
        if len(token) > MAX_DIGITS:
            raise ExpressionError(f"a number of {len(token)} characters; at most {MAX_DIGITS} are read")
        literals.append(Fraction(token))
        return literals[-1]

    def apply(name: str, *operands: Fraction) -> Fraction:
        if name in ("**", "//"):
            raise ExpressionError(f"the operator {name} is not one of + - * /")
        result: Fraction = _FUNCTION[name](*operands)
        return result

    value = _compute(_tokens(text, python=False), number, apply)
    return Evaluation(value, tuple(literals))


def evaluate_like_python(text: str) -> int | float | complex:
    """The value Python gives an expression of digits and `+ - * / ( ) .` and spaces, errors included.

    Values follow Python: `/` gives a float, `//` floors, `**` binds right, a negative root is complex, `007` is an
    error. An integer above `MAX_BITS` is an error where Python would go on: such a value cannot be near a target.

    Raises:
        ExpressionError: the text has another character, Python would raise, or a bound is exceeded.
    """
    return _compute(_tokens(text.strip(), python=True), _python_number, _PythonArithmetic().apply)


class _PythonArithmetic:
    """Python's operators on bounded numbers; owns the work spent on one expression."""

    def __init__(self) -> None:
        self.work = 0

    def apply(self, name: str, *operands: Any) -> Any:
        if all(isinstance(operand, int) for operand in operands):
            self._refuse_large(name, *operands)
        result = _FUNCTION[name](*operands)
        if isinstance(result, int):
            self.work += result.bit_length()
            if self.work > MAX_WORK:
                raise ExpressionError(f"intermediate results of more than {MAX_WORK} bits")
        return result

    @staticmethod
    def _refuse_large(name: str, left: int, right: int = 0) -> None:
        if name == "**" and abs(left) > 1 and right > 0:
            bits = left.bit_length() * right
        elif name == "*":
            bits = left.bit_length() + right.bit_length()
        else:
            return
        if bits > MAX_BITS:
            raise ExpressionError(f"an integer of more than {MAX_BITS} bits")


def _compute(tokens: Iterator[tuple[str, str]], number: Callable[[str], Any], apply: Callable[..., Any]) -> Any:
    """Operator precedence with explicit stacks, so that no nesting can exhaust Python's own."""
    values: list[Any] = []
    waiting: list[str] = []  # operators and open parentheses

    def settle() -> None:
        name = waiting.pop()
        arguments = 1 if name in ("+x", "-x") else 2
        operands = values[-arguments:]
        del values[-arguments:]
        values.append(apply(name, *operands))

    operand_next = True
    try:
        for kind, token in tokens:
            if (kind == "number" or token == "(") != operand_next and token not in _PREFIX:
                raise ExpressionError(f"{token!r} where {'a number' if operand_next else 'an operator'} is needed")
            if kind == "number":
                values.append(number(token))
                operand_next = False
            elif token == "(":
                waiting.append(token)
            elif token == ")":
                while waiting and waiting[-1] != "(":
                    settle()
                if not waiting:
                    raise ExpressionError("a parenthesis that was not opened")
                waiting.pop()
            elif operand_next:
                waiting.append(_PREFIX[token])
            else:
                level = _PRECEDENCE[token]
                while waiting and waiting[-1] != "(" and _PRECEDENCE[waiting[-1]] + (token != "**") > level:
                    settle()
                waiting.append(token)
                operand_next = True
        if operand_next or "(" in waiting:
            raise ExpressionError("the expression is not complete")
        while waiting:
            settle()
    except (ArithmeticError, TypeError) as error:
        raise ExpressionError(str(error)) from error
    return values[0]


def _tokens(text: str, *, python: bool) -> Iterator[tuple[str, str]]:
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    position = depth = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"{text[position]!r} is not arithmetic")
        kind, token = match.lastgroup or "", match.group()
        depth += (token == "(") - (token == ")")
        if depth > MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} open parentheses")
        # To Python a line break outside parentheses ends the expression, and a vertical tab is no white space.
        if python and (token == "\v" or (token in "\r\n" and depth == 0)):
            raise ExpressionError(f"{token!r} inside an expression")
        if kind != "space":
            yield kind, token
        position = match.end()


def _python_number(token: str) -> int | float:
    if "." in token:
        return float(token)
    if token.startswith("0") and token.strip("0"):
        raise ExpressionError(f"an integer with leading zeros: {token}")
    try:
        return int(token)
    except ValueError as error:  # more digits than Python turns into an integer
        raise ExpressionError(str(error)) from error
