"""Values survive the way out of a program's process, and a hostile text does no harm to who reads it."""

from __future__ import annotations

import collections
import enum
import json
import math
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rl4dlm.grading.sandbox.data import NotData, decode, encode

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.complex_numbers(allow_nan=False), st.just(2**5000),
)  # fmt: skip
_hashable = st.recursive(
    _scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5
)
_values = st.recursive(
    _hashable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(_hashable, inner, max_size=3)
        | st.sets(_hashable, max_size=3)
    ),
    max_leaves=12,
)


def same(first: Any, second: Any) -> bool:
    """Equal, with equal types all the way down."""
    if type(first) is not type(second) or first != second:
        return False
    if isinstance(first, list | tuple):
        return all(map(same, first, second))
    if isinstance(first, dict):
        return all(map(same, first.values(), second.values())) and all(map(same, first, second))
    if isinstance(first, float):
        return math.copysign(1, first) == math.copysign(1, second)
    return True


@given(_values)
@settings(max_examples=60)
def test_values_come_back(value: Any) -> None:
    assert same(decode(encode(value, 1 << 20)), value)


def test_what_is_not_finite_and_lone_surrogates_come_back() -> None:
    value = decode(encode([math.inf, -math.inf, math.nan, "\ud800"], 1000))
    assert value[:2] == [math.inf, -math.inf] and math.isnan(value[2]) and value[3] == "\ud800"


class Everything(list[int]):
    """A list that says other things of itself than it is made of."""

    def __eq__(self, other: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter([9, 9])

    def __len__(self) -> int:
        return 2

    __hash__ = None  # type: ignore[assignment]


class Number(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Colour(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "made_of"),
    [
        (Everything([1, 2, 3]), [1, 2, 3]),
        (Number(7), 7),
        (Colour.RED, 3),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.namedtuple("P", "x y")(1, 2), (1, 2)),
        (type("S", (str,), {"__str__": lambda self: "lie"})("truth"), "truth"),
        (type("F", (float,), {"__float__": lambda self: 1.0})(-0.0), -0.0),
        (type("B", (bytes,), {})(b"x"), b"x"),
        (bytearray(b"x"), b"x"),
        (np.float64(1.5), 1.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_are_what_they_are_made_of(value: Any, made_of: Any) -> None:
    assert same(decode(encode(value, 1000)), made_of)


@pytest.mark.parametrize(
    "value",
    [object(), len, [lambda: 1], memoryview(b""), (x for x in ()), Exception(), np.zeros(2), {1: object()}, type],
)
def test_other_things_are_no_data(value: Any) -> None:
    with pytest.raises(NotData):
        encode(value, 1000)


def test_size_and_depth_are_bounded() -> None:
    for value in ("x" * 2000, [0] * 2000, 1 << 20_000, b"x" * 1000):
        with pytest.raises(NotData, match="large|bytes"):
            encode(value, 1000)
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(NotData, match="deeper"):
        encode(deep, 1 << 20)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"x", b'{"q": 1}', b'{"t": 3}', b'{"t": [], "s": []}', b'{"s": [[]]}', b'{"d": [1]}', b'{"d": [[1]]}',
        b'{"i": "zz"}', b'{"i": 1}', b'{"b": "0"}', b'{"b": 3}', b'{"c": [1]}', b'{"c": "xy"}', b"{}",
        b"[" * 100_000, b"[" * 300 + b"]" * 300, b'{"t":' * 500 + b"[]" + b"}" * 500, b"\xff",
    ],
)  # fmt: skip
def test_text_that_is_no_value_is_refused(text: bytes) -> None:
    with pytest.raises(NotData):
        decode(text)


def test_items_of_one_hash_do_not_stop_the_reader() -> None:
    modulus = (1 << 61) - 1
    alike = [{"i": hex(number * modulus)} for number in range(1, 30_000)]
    for text in (json.dumps({"s": alike}), json.dumps({"d": [[item, 0] for item in alike]})):
        started = time.process_time()
        with pytest.raises(NotData):
            decode(text.encode())
        assert time.process_time() - started < 5  # it would take minutes


@pytest.mark.parametrize(
    "value",
    [
        range(3), range(5, -1, -2), deque([1, {2}]), Fraction(-1, 3), Fraction(2**900, 3), Decimal("1.50"),
        Decimal("NaN"), Decimal("-Infinity"), Decimal("1E-900"), {Fraction(1, 2): [range(2)]},
    ],
)  # fmt: skip
def test_data_of_the_standard_library_keeps_its_type(value: Any) -> None:
    found = decode(encode(value, 10_000))
    assert type(found) is type(value) and repr(found) == repr(value)


@pytest.mark.parametrize("value", [range(10**7), Fraction(1, 10**2000), Decimal("1E+100000"), Decimal("1E-100000")])
def test_what_would_take_forever_to_work_with_is_no_data(value: Any) -> None:
    with pytest.raises(NotData):
        decode(encode(value, 10_000))


@pytest.mark.parametrize(
    "text", [b'{"q": [1, 0]}', b'{"n": "sNaN"}', b'{"r:": [1, 2, 0]}', b'{"n": "x"}', b'{"n": 5}', b'{"q": ["a", 1]}']
)
def test_texts_of_no_such_value(text: bytes) -> None:
    with pytest.raises(NotData):
        decode(text)
