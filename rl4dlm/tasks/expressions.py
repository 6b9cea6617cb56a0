"""Arithmetic expressions over natural numbers as trees: drawn, written, worked out step by step, and made canonical.

Owns the expressions of the generated language tasks. What a model wrote is read by `rl4dlm.grading.expression`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

SYMBOLS = "+-*/"


class Operation(NamedTuple):
    """One of `SYMBOLS` between two expressions."""

    symbol: str
    left: Expression
    right: Expression


Expression: TypeAlias = int | Operation


def check_symbols(symbols: str) -> None:
    """Refuse a setting `symbols` that is not some of `SYMBOLS`."""
    if not symbols or any(symbols.count(symbol) != 1 or symbol not in SYMBOLS for symbol in symbols):
        raise ValueError(f"symbols={symbols!r}; give some of {SYMBOLS!r}, each once")


def draw(rng: random.Random, numbers: Sequence[int], symbols: str) -> Expression:
    """An expression of random shape and symbols with these numbers in this order."""
    if len(numbers) == 1:
        return numbers[0]
    cut = rng.randrange(1, len(numbers))
    return Operation(rng.choice(symbols), draw(rng, numbers[:cut], symbols), draw(rng, numbers[cut:], symbols))


def value(expression: Expression, most: int) -> int | None:
    """The value, if it and those of all parts are natural numbers up to `most`; else `None`."""
    if isinstance(expression, int):
        return expression if 0 <= expression <= most else None
    left, right = value(expression.left, most), value(expression.right, most)
    if left is None or right is None or (expression.symbol == "/" and (right == 0 or left % right)):
        return None
    return value(_apply(expression.symbol, left, right), most)


def written(expression: Expression) -> str:
    """As text, without parentheses that the order of reading makes superfluous: `3-4-5`, but `3-(4-5)`, `3+(4+5)`."""
    if isinstance(expression, int):
        return str(expression)
    symbol, left, right = expression
    level = _level(symbol)
    before, after = written(left), written(right)
    if isinstance(left, Operation) and _level(left.symbol) < level:
        before = f"({before})"
    if isinstance(right, Operation) and _level(right.symbol) <= level:
        after = f"({after})"
    return before + symbol + after


def step(operation: Operation) -> Expression:
    """With its first operation on two numbers done, in the order of reading."""
    symbol, left, right = operation
    if isinstance(left, Operation):
        return Operation(symbol, step(left), right)
    if isinstance(right, Operation):
        return Operation(symbol, left, step(right))
    return _apply(symbol, left, right)


def canonical(expression: Expression) -> str:
    """One text for all expressions that are the same but for the order and the grouping of sums and of products.

    `3-(4-5)` and `5+3-4` have the same, `(2+3)*4` and `2*4+3*4` do not.
    """
    if isinstance(expression, int):
        return str(expression)
    return f"({''.join(sorted(_terms(expression, _level(expression.symbol), inverse=False)))})"


def _terms(expression: Expression, level: int, *, inverse: bool) -> Iterator[str]:
    """The terms of a sum, or the factors of a product, each with its sign."""
    if isinstance(expression, int) or _level(expression.symbol) != level:
        yield SYMBOLS[2 * level + inverse] + canonical(expression)
        return
    yield from _terms(expression.left, level, inverse=inverse)
    yield from _terms(expression.right, level, inverse=inverse != (expression.symbol in "-/"))


def _level(symbol: str) -> int:
    """0 of a sum, 1 of a product, which binds more tightly."""
    return SYMBOLS.index(symbol) // 2


def _apply(symbol: str, left: int, right: int) -> int:
    if symbol == "+":
        return left + right
    if symbol == "-":
        return left - right
    return left * right if symbol == "*" else left // right
