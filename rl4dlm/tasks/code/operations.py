"""The operations that `code_mini` chains, each with what it is called, what it does, and how programs write it.

Owns the vocabulary of kinds and operations, and the way from a chain of them to a value and to a program. Values are
those of `Operation.apply`; the written forms are programs that do the same, which tests hold against it.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("text", "items", "n")
"""What a function takes, by the name of its argument: a text, a list of numbers, a number."""

_DIGITS = tuple((k,) for k in range(2, 10))
_LETTERS = (("a",), ("b",), ("c",))
_PAIRS = tuple((k, m) for k in "abc" for m in "abc" if k != m)


@dataclass(frozen=True)
class Operation:
    """One step from a value to another.

    Attributes:
        phrase: what it is called, with `{k}` and `{m}` for its arguments.
        takes, gives: of `KINDS`.
        apply: the value, from the value before and the arguments.
        forms: expressions that compute it, with the names X for the value before and K and M for the arguments.
        arguments: all that it may have.
    """

    phrase: str
    takes: str
    gives: str
    apply: Callable[..., Any]
    forms: tuple[str, ...]
    arguments: tuple[tuple[Any, ...], ...] = ((),)


class Step(NamedTuple):
    """An operation with its arguments."""

    operation: Operation
    arguments: tuple[Any, ...]

    @property
    def phrase(self) -> str:
        """What it is called."""
        return self.operation.phrase.format(**dict(zip("km", self.arguments, strict=False)))


def _one_kind(kind: str, *rows: tuple[Any, ...]) -> list[Operation]:
    return [Operation(phrase, kind, gives or kind, apply, forms, *more) for phrase, gives, apply, forms, *more in rows]


OPERATIONS: tuple[Operation, ...] = (
    *_one_kind(
        "text",
        ("reverse", "", lambda x: x[::-1], ("X[::-1]", "''.join(reversed(X))")),
        ("double", "", lambda x: x + x, ("X * 2", "X + X")),
        ("drop first", "", lambda x: x[1:], ("X[1:]",)),
        ("drop last", "", lambda x: x[:-1], ("X[:-1]",)),
        ("upper", "", lambda x: x.upper(), ("X.upper()",)),
        ("lower", "", lambda x: x.lower(), ("X.lower()",)),
        ("swap case", "", lambda x: x.swapcase(), ("X.swapcase()",)),
        ("sort", "", lambda x: "".join(sorted(x)), ("''.join(sorted(X))",)),
        ("every second", "", lambda x: x[::2], ("X[::2]",)),
        ("append {k}", "", lambda x, k: x + k, ("X + K", "''.join([X, K])"), _LETTERS),
        ("prepend {k}", "", lambda x, k: k + x, ("K + X", "''.join([K, X])"), _LETTERS),
        (
            "remove {k}",
            "",
            lambda x, k: "".join(y for y in x if y != k),
            ("X.replace(K, '')", "''.join(X.split(K))"),
            _LETTERS,
        ),
        (
            "replace {k} with {m}",
            "",
            lambda x, k, m: "".join(m if y == k else y for y in x),
            ("X.replace(K, M)", "M.join(X.split(K))"),
            _PAIRS,
        ),
        ("length", "n", len, ("len(X)",)),
        ("count {k}", "n", lambda x, k: sum(y == k for y in x), ("X.count(K)",), _LETTERS),
    ),
    *_one_kind(
        "items",
        ("reverse", "", lambda x: x[::-1], ("X[::-1]", "list(reversed(X))")),
        ("sort", "", sorted, ("sorted(X)",)),
        ("drop first", "", lambda x: x[1:], ("X[1:]",)),
        ("drop last", "", lambda x: x[:-1], ("X[:-1]",)),
        ("every second", "", lambda x: x[::2], ("X[::2]",)),
        ("append {k}", "", lambda x, k: [*x, k], ("X + [K]", "[*X, K]"), _DIGITS),
        ("prepend {k}", "", lambda x, k: [k, *x], ("[K] + X", "[K, *X]"), _DIGITS),
        ("add {k}", "", lambda x, k: [y + k for y in x], ("[y + K for y in X]", "[K + y for y in X]"), _DIGITS),
        ("times {k}", "", lambda x, k: [y * k for y in x], ("[y * K for y in X]", "[K * y for y in X]"), _DIGITS),
        ("square", "", lambda x: [y * y for y in x], ("[y * y for y in X]", "[y ** 2 for y in X]")),
        (
            "keep over {k}",
            "",
            lambda x, k: [y for y in x if y > k],
            ("[y for y in X if y > K]", "[y for y in X if K < y]"),
            _DIGITS,
        ),
        (
            "keep even",
            "",
            lambda x: [y for y in x if y % 2 == 0],
            ("[y for y in X if y % 2 == 0]", "[y for y in X if not y % 2]"),
        ),
        (
            "keep odd",
            "",
            lambda x: [y for y in x if y % 2 == 1],
            ("[y for y in X if y % 2 == 1]", "[y for y in X if y % 2]"),
        ),
        ("sum", "n", sum, ("sum(X)",)),
        ("length", "n", len, ("len(X)",)),
        ("count {k}", "n", lambda x, k: x.count(k), ("X.count(K)",), _DIGITS),
    ),
    *_one_kind(
        "n",
        ("add {k}", "", lambda x, k: x + k, ("X + K", "K + X"), _DIGITS),
        ("subtract {k}", "", lambda x, k: x - k, ("X - K", "-K + X"), _DIGITS),
        ("times {k}", "", lambda x, k: x * k, ("X * K", "K * X"), _DIGITS),
        ("remainder by {k}", "", lambda x, k: x % k, ("X % K",), _DIGITS),
        ("whole part by {k}", "", lambda x, k: x // k, ("X // K",), _DIGITS),
        ("square", "", lambda x: x * x, ("X ** 2", "X * X")),
        ("negate", "", lambda x: -x, ("-X", "0 - X")),
        ("absolute", "", abs, ("abs(X)",)),
    ),
)


def draw_steps(rng: random.Random, kind: str, count: int) -> list[Step]:
    """So many random operations, the first on something of this kind, each on what the one before gives."""
    steps: list[Step] = []
    for _ in range(count):
        operation = rng.choice([operation for operation in OPERATIONS if operation.takes == kind])
        steps.append(Step(operation, rng.choice(operation.arguments)))
        kind = operation.gives
    return steps


def draw_value(rng: random.Random, kind: str) -> Any:
    """Something that a function of this kind may be called with: short, and sometimes empty or 0."""
    if kind == "text":
        return "".join(rng.choice("abcABC") for _ in range(rng.randint(0, 7)))
    if kind == "items":
        return [rng.randint(-3, 9) for _ in range(rng.randint(0, 7))]
    return rng.randint(-30, 30)


def value_of(steps: Sequence[Step], value: Any) -> Any:
    """What the operations make of a value."""
    for operation, arguments in steps:
        value = operation.apply(value, *arguments)
    return value


def written(steps: Sequence[Step], kind: str, rng: random.Random) -> str:
    """A function `f` that does these operations, in a random one of the ways that there are to write it.

    Each operation has its forms; its value goes into the next expression or, in a line of its own, into the argument.
    """
    lines = [f"def f({kind}):"]
    left: ast.expr = ast.Name(kind)
    for number, (operation, arguments) in enumerate(steps):
        if number and rng.random() < 0.5:
            lines.append(f"{kind} = {ast.unparse(left)}")
            left = ast.Name(kind)
        names = dict(zip("KM", map(ast.Constant, arguments), strict=False))
        # A form that says X twice would compute what is before it twice.
        forms = [form for form in operation.forms if form.count("X") == 1 or isinstance(left, ast.Name)]
        tree = ast.parse(rng.choice(forms), mode="eval").body
        left = _Put({"X": left, **names}).visit(tree)
    lines.append(f"return {ast.unparse(left)}")
    return "\n    ".join(lines)


class _Put(ast.NodeTransformer):
    """Puts expressions in the place of names; brackets come back where `ast.unparse` needs them."""

    def __init__(self, expressions: dict[str, ast.expr]) -> None:
        self.expressions = expressions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.expressions.get(node.id, node)
