"""Values as text and back: how answers leave a program's process.

Owns the encoding, which both sides import. Only plain data passes, and what comes out of `decode` is of the builtin
types themselves, whatever the text says: it was written by a program that may lie.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 100
_LONGEST_RANGE = 1 << 20  # whoever looks through it would be busy for long
_MOST_DIGITS = 1000  # of a fraction or a decimal, whose arithmetic is not linear
_SMALL = 1 << 53  # beyond it an integer goes as hexadecimal text, which has no limit of digits


class NotData(ValueError):
    """A value that is not plain data, or too large or too deep."""


def encode(value: Any, max_bytes: int, other: Callable[[Any], Any] | None = None) -> bytes:
    """A value as text in JSON.

    None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, deque, Fraction and Decimal
    keep their types; an instance of a subclass becomes what it is made of, whatever its methods say; numpy's scalars
    become numbers.

    Args:
        other: what to write for anything else, an object for JSON with one key.

    Raises:
        NotData: something else, deeper than `MAX_DEPTH`, or longer than `max_bytes`.
    """
    text = json.dumps(_pack(value, 0, [max_bytes], other)).encode()
    if len(text) > max_bytes:
        raise NotData(f"the value takes more than {max_bytes} bytes")
    return text


def decode(text: bytes, other: Callable[[str, Any], Any] | None = None) -> Any:
    """The value that `encode` wrote.

    Args:
        other: makes what the key and the content of an unknown object stand for.

    Raises:
        NotData: text that `encode` does not write.
    """
    try:
        return _unpack(json.loads(text), 0, other)
    except (ValueError, TypeError, RecursionError, KeyError, IndexError, ArithmeticError) as error:
        raise NotData(f"no encoded value: {type(error).__name__}") from None


def _pack(value: Any, depth: int, room: list[int], other: Callable[[Any], Any] | None) -> Any:
    kind = type(value)
    room[0] -= 2  # what each costs at least: stops long before a huge value is text
    if room[0] < 0:
        raise NotData("the value is too large")
    if value is None or kind is bool or kind is float:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"i": _hexadecimal(value, room)}
    if kind is str:
        room[0] -= len(value)
        return value
    if depth > MAX_DEPTH:
        raise NotData(f"the value is nested deeper than {MAX_DEPTH}")
    if kind is dict:
        return {"d": [[_pack(part, depth + 1, room, other) for part in pair] for pair in value.items()]}
    if kind in _TAGS:
        packed = [_pack(item, depth + 1, room, other) for item in value]
        return {_TAGS[kind]: packed} if _TAGS[kind] else packed
    if kind is complex:
        return {"c": [value.real, value.imag]}
    if kind is range:
        return {"r:": [_pack(part, depth + 1, room, other) for part in (value.start, value.stop, value.step)]}
    if kind is Fraction:
        return {"q": [_pack(part, depth + 1, room, other) for part in (value.numerator, value.denominator)]}
    if kind is Decimal:
        room[0] -= len(str(value))
        return {"n": str(value)}
    if kind is bytes or kind is bytearray:
        room[0] -= 2 * len(value)
        if room[0] < 0:
            raise NotData("the value is too large")
        return {"b": value.hex()}
    try:
        base = _base(value)
    except NotData:
        if other is None:
            raise
        return other(value)
    return _pack(base, depth + 1, room, other)


_TAGS: dict[Any, str] = {list: "", tuple: "t", set: "s", frozenset: "f", deque: "l"}


def _hexadecimal(value: int, room: list[int]) -> str:
    room[0] -= value.bit_length() // 4
    if room[0] < 0:
        raise NotData("the value is too large")
    return hex(value)


def _base(value: Any) -> Any:
    """What an instance of a subclass is made of. Its own methods are not asked, since they may say anything."""
    if isinstance(value, int):
        return int.__pos__(value)
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, complex):
        return complex.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes.__add__(b"", value)
    if isinstance(value, bytearray):
        return bytes(bytearray.copy(value))
    if isinstance(value, list):
        return list.__getitem__(value, slice(None))
    if isinstance(value, tuple):
        return tuple(tuple.__iter__(value))
    if isinstance(value, dict):
        return dict(zip(dict.keys(value), dict.values(value), strict=True))
    if isinstance(value, frozenset):
        return frozenset(frozenset.__iter__(value))
    if isinstance(value, set):
        return set(set.__iter__(value))
    if type(value).__module__ == "numpy" and callable(getattr(value, "item", None)) and not getattr(value, "shape", 1):
        return value.item()
    raise NotData(f"a value of type {type(value).__name__} is no plain data")


def _unpack(packed: Any, depth: int, other: Callable[[str, Any], Any] | None) -> Any:
    if packed is None or isinstance(packed, bool | int | float | str):
        return packed
    if depth > 2 * MAX_DEPTH:
        raise ValueError
    if isinstance(packed, list):
        return [_unpack(item, depth + 1, other) for item in packed]
    ((tag, content),) = packed.items()
    if tag == "i":
        return int(content, 16)
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "c":
        real, imag = content
        return complex(float(real), float(imag))
    if tag == "d":
        keys = _spread([_unpack(key, depth + 1, other) for key, _ in content])
        return dict(zip(keys, [_unpack(item, depth + 1, other) for _, item in content], strict=True))
    if tag in _MAKERS:
        if not isinstance(content, list):
            raise ValueError
        items = [_unpack(item, depth + 1, other) for item in content]
        return _MAKERS[tag](items if tag in ("t", "l") else _spread(items))
    if tag == "r:":
        numbers = range(*(_number(part) for part in content))
        if len(numbers) > _LONGEST_RANGE:
            raise ValueError
        return numbers
    if tag == "q":
        return Fraction(*(_number(part) for part in content))
    if tag == "n":
        number = Decimal(content[:_MOST_DIGITS])
        if number.is_snan() or (number.is_finite() and abs(number.adjusted()) > _MOST_DIGITS):
            raise ValueError
        return number
    if other is None:
        raise ValueError
    return other(tag, content)


def _number(packed: Any) -> int:
    number = _unpack(packed, 2 * MAX_DEPTH, None)
    if type(number) is not int or number.bit_length() > 4 * _MOST_DIGITS:
        raise ValueError
    return number


def _spread(items: list[Any]) -> list[Any]:
    """Refuses items made to have one hash: a set of a hundred thousand of them takes minutes to make."""
    if len(items) > _MOST_ALIKE:
        seen: dict[int, int] = {}
        for item in items:
            number = hash(item)
            seen[number] = seen.get(number, 0) + 1
            if seen[number] > _MOST_ALIKE:
                raise ValueError
    return items


_MOST_ALIKE = 64
_MAKERS: dict[str, Any] = {"t": tuple, "s": set, "f": frozenset, "l": deque}
