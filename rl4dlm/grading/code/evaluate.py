"""Works out what a test says about values, without running anything.

Owns a small part of Python's expressions, over plain data: literals, comparisons, arithmetic, and a few functions that
tests use, such as `len`, `sorted` and `math.isclose`. Values come from programs and expressions from datasets, so every
operation is bounded and nothing is called but the functions listed here.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

_LONGEST = 1 << 20  # of a sequence that an operation makes
_MOST_ALIKE = 64
_MOST_BITS = 1 << 17  # of an integer that an operation makes


class CannotEvaluateError(Exception):
    """The expression needs more than is done here, or fails on these values as it would in Python."""


class Approximately:
    """What `pytest.approx` stands for: a number, or numbers in a list, tuple or dict, each equal within a tolerance."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self.expected, self.nan_ok = expected, nan_ok
        self.relative = (1e-6 if abs is None else 0.0) if rel is None else rel
        self.absolute = 1e-12 if abs is None else abs

    def matches(self, value: Any) -> bool:
        """Whether a value is near enough, by pytest's rule."""
        return self._near(value, self.expected)

    def _near(self, value: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(value, dict)
                and value.keys() == expected.keys()
                and all(self._near(value[key], item) for key, item in expected.items())
            )
        if isinstance(expected, list | tuple):
            return (
                isinstance(value, list | tuple)
                and len(value) == len(expected)
                and all(self._near(v, e) for v, e in zip(value, expected, strict=True))
            )
        if not isinstance(value, int | float) or not isinstance(expected, int | float):
            return bool(value == expected)
        if math.isnan(expected):
            return self.nan_ok and math.isnan(value)
        if value == expected or math.isinf(expected):
            return value == expected
        return abs(value - expected) <= max(self.relative * abs(expected), self.absolute)


_TYPES: dict[str, type] = {
    t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
}


def _bounded(make: Callable[..., Any]) -> Callable[..., Any]:
    def run(*values: Any, **options: Any) -> Any:
        if sum(len(value) for value in values if hasattr(value, "__len__")) > _LONGEST:
            raise CannotEvaluateError("too long")
        return make(*values, **options)

    return run


def _hashed(make: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses different items of one hash: a set of a hundred thousand that were made so takes minutes to make."""

    def run(items: Any = ()) -> Any:
        keys = list(items.items() if isinstance(items, dict) and make is dict else items)
        firsts: dict[int, Any] = {}
        others = 0
        for key in (pair[0] for pair in keys) if make is dict else keys:
            others += firsts.setdefault(hash(key), key) != key
        if others > _MOST_ALIKE:
            raise CannotEvaluateError("many different items of one hash")
        return make(keys)

    return run


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > _LONGEST:
        raise CannotEvaluateError("too long")
    return numbers


def _sum(numbers: Any, start: Any = 0) -> Any:
    if not all(isinstance(number, int | float | complex | Fraction | Decimal) for number in (*numbers, start)):
        raise CannotEvaluateError("sum of what is no number")
    return sum(numbers, start)


def _isinstance(value: Any, kind: Any) -> bool:
    return isinstance(value, kind)


# Functions of Python, by the name under which a test calls them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _bounded(make) for name, make in _TYPES.items() if name not in ("str", "bytes")},
    **{make.__name__: _hashed(make) for make in (set, frozenset, dict)},
    **{f.__name__: f for f in (abs, all, any, len, max, min, ord, chr, round, divmod)},
    "str": _bounded(str),
    "repr": _bounded(repr),
    "sorted": _bounded(sorted),
    "reversed": _bounded(lambda items: list(reversed(items))),
    "enumerate": _bounded(lambda items, start=0: list(enumerate(items, start))),
    "zip": _bounded(lambda *items: list(zip(*items))),  # noqa: B905, as Python's own
    "range": _range,
    "sum": _sum,
    "isinstance": _isinstance,
    "type": type,
    **{
        f"math.{name}": getattr(math, name)
        for name in ("isclose", "sqrt", "floor", "ceil", "fabs", "isnan", "isinf", "isfinite", "log", "exp", "sin")
    },
    "pytest.approx": Approximately,
}
_KEYWORDS = {"sorted": ("reverse",), "math.isclose": ("rel_tol", "abs_tol"), "pytest.approx": ("rel", "abs", "nan_ok")}
_CONSTANTS = {"math.pi": math.pi, "math.e": math.e, "math.inf": math.inf, "math.nan": math.nan}

# Methods of plain data; each is called on a value whose type is exactly one of those that have it.
METHODS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("startswith", "endswith", "isdigit", "isalpha", "isalnum", "isnumeric", "isspace"), (str,)),
    **dict.fromkeys(("isupper", "islower", "upper", "lower", "title", "strip", "lstrip", "rstrip"), (str,)),
    **dict.fromkeys(("split", "splitlines", "find"), (str,)),
    **dict.fromkeys(("count", "index"), (str, list, tuple)),
    **dict.fromkeys(("keys", "values", "items", "get"), (dict,)),
    **dict.fromkeys(("issubset", "issuperset", "isdisjoint"), (set, frozenset)),
}


def _bits(value: Any) -> int:
    if isinstance(value, Fraction):
        return value.numerator.bit_length() + value.denominator.bit_length()
    return value.bit_length() if isinstance(value, int) else 0


def _multiply(left: Any, right: Any) -> Any:
    for items, times in ((left, right), (right, left)):
        if hasattr(items, "__len__") and isinstance(times, int) and len(items) * times > _LONGEST:
            raise CannotEvaluateError("too long")
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, int) and _bits(base) * abs(exponent) > _MOST_BITS:
        raise CannotEvaluateError("too large")
    return base**exponent


def _remainder(left: Any, right: Any) -> Any:
    if not isinstance(left, int | float):  # text % values formats, to any width
        raise CannotEvaluateError("formatting")
    return left % right


def _shift(left: Any, right: Any) -> Any:
    if isinstance(right, int) and right > _MOST_BITS:
        raise CannotEvaluateError("too large")
    return left << right


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: _bounded(operator.add),
    ast.Sub: operator.sub,
    ast.Mult: _multiply,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: _remainder,
    ast.Pow: _power,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: _shift,
    ast.RShift: operator.rshift,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


def evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of an expression.

    Args:
        node: the expression.
        values: plain data for the names in it.

    Raises:
        CannotEvaluateError: something in it is not done here, or fails on these values.
    """
    try:
        return _value(node, values)
    except CannotEvaluateError:
        raise
    except Exception as error:
        raise CannotEvaluateError(f"{type(error).__name__}: {error}") from error


def called(node: ast.Call) -> str | None:
    """The name in `FUNCTIONS` of the function that an expression calls; None where it is another."""
    name = node.func.id if isinstance(node.func, ast.Name) else _dotted(node.func)
    return name if name in FUNCTIONS else None


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if node.id in values:
                return values[node.id]
            if node.id in _TYPES:
                return _TYPES[node.id]
        case ast.Attribute():
            if (name := _dotted(node)) in _CONSTANTS:
                return _CONSTANTS[str(name)]
        case ast.List() | ast.Tuple() | ast.Set():
            items = _items(node.elts, values)
            return items if isinstance(node, ast.List) else tuple(items) if isinstance(node, ast.Tuple) else set(items)
        case ast.Dict() if None not in node.keys:
            return {_value(key, values): _value(item, values) for key, item in zip(node.keys, node.values, strict=True)}  # type: ignore[arg-type]
        case ast.UnaryOp():
            return _UNARY[type(node.op)](_value(node.operand, values))
        case ast.BinOp():
            return _binary(node, values)
        case ast.BoolOp():
            result: Any = None
            for operand in node.values:
                result = _value(operand, values)
                if bool(result) is isinstance(node.op, ast.Or):
                    break
            return result
        case ast.IfExp():
            return _value(node.body if _value(node.test, values) else node.orelse, values)
        case ast.Compare():
            return _compare(node, values)
        case ast.Subscript():
            return _value(node.value, values)[_value(node.slice, values)]
        case ast.Slice():
            return slice(*(part and _value(part, values) for part in (node.lower, node.upper, node.step)))
        case ast.Call():
            return _call(node, values)
    raise CannotEvaluateError(f"{type(node).__name__} is not evaluated here")


def _items(nodes: list[ast.expr], values: Mapping[str, Any]) -> list[Any]:
    items: list[Any] = []
    for node in nodes:
        if isinstance(node, ast.Starred):
            items += _value(node.value, values)
        else:
            items.append(_value(node, values))
    return items


def _binary(node: ast.BinOp, values: Mapping[str, Any]) -> Any:
    left, right = _value(node.left, values), _value(node.right, values)
    if isinstance(node.op, ast.BitOr) and isinstance(left, type):  # a union of types, as `int | None`
        return (left, right)
    if not isinstance(node.op, ast.Add | ast.Sub) and _bits(left) * _bits(right) > _MOST_BITS**2:
        raise CannotEvaluateError("too large")
    if type(node.op) not in _BINARY:
        raise CannotEvaluateError(f"{type(node.op).__name__} is not evaluated here")
    return _BINARY[type(node.op)](left, right)


def _compare(node: ast.Compare, values: Mapping[str, Any]) -> bool:
    operands = [node.left, *node.comparators]
    known: list[Any] = [_value(operands[0], values)]
    for operation, (_, right) in zip(node.ops, pairwise(operands), strict=True):
        known.append(_value(right, values))
        if not _holds(operation, known[-2], known[-1]):
            return False
    return True


def _holds(operation: ast.cmpop, left: Any, right: Any) -> bool:
    if isinstance(operation, ast.Is | ast.IsNot):
        # Identity tells anything only of what there is once; a number that comes back is another object.
        same = left is right if left is None or right is None else type(left) is type(right) and left == right
        return same is isinstance(operation, ast.Is)
    if isinstance(left, Approximately) or isinstance(right, Approximately):
        near = left.matches(right) if isinstance(left, Approximately) else right.matches(left)
        if not isinstance(operation, ast.Eq | ast.NotEq):
            raise CannotEvaluateError("approx is only compared by ==")
        return near is isinstance(operation, ast.Eq)
    return bool(_ORDER[type(operation)](left, right))


def _call(node: ast.Call, values: Mapping[str, Any]) -> Any:
    arguments = _items(node.args, values)
    name = called(node)
    if name is not None and not (isinstance(node.func, ast.Name) and node.func.id in values):
        if any(keyword.arg not in _KEYWORDS.get(name, ()) for keyword in node.keywords):
            raise CannotEvaluateError(f"{name} with such arguments is not evaluated here")
        return FUNCTIONS[name](*arguments, **{str(k.arg): _value(k.value, values) for k in node.keywords})
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.keywords:
        owner = _value(node.func.value, values)
        if type(owner) in METHODS[node.func.attr]:
            return getattr(owner, node.func.attr)(*arguments)
    raise CannotEvaluateError("this call is not evaluated here")


def is_within(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression consists of what is evaluated here, over these names; on some values it may still fail."""
    match node:
        case ast.Constant():
            return True
        case ast.Name():
            return node.id in names or node.id in _TYPES
        case ast.Attribute():
            return _dotted(node) in _CONSTANTS
        case ast.Call():
            name = called(node)
            inner = [*node.args, *(keyword.value for keyword in node.keywords)]
            if name is not None:
                fits = all(keyword.arg in _KEYWORDS.get(name, ()) for keyword in node.keywords)
            else:
                fits = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.keywords
                inner += [node.func.value] if isinstance(node.func, ast.Attribute) else []
            return fits and all(is_within(part, names) for part in inner)
        case ast.Starred() | ast.UnaryOp() | ast.BoolOp() | ast.IfExp() | ast.Compare() | ast.Subscript() | ast.Slice():
            pass
        case ast.List() | ast.Tuple() | ast.Set():
            pass
        case ast.BinOp():
            if type(node.op) not in _BINARY:
                return False
        case ast.Dict():
            if None in node.keys:
                return False
        case _:
            return False
    return all(is_within(child, names) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
