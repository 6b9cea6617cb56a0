"""Reading values back from the slots of a scaffold: what a finished canvas says, as JSON. Reading never fails.

Owns what each kind of slot means; where slots are and what may stand in them is `schema.py`'s.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

DIGITS_PER_TOKEN = 3
MAX_DIGITS = 100
"""Tokens of a number: with at most three digits each it stays below the largest float."""


class Reader(Protocol):
    """Makes a value of the tokens of a canvas."""

    def value(self, canvas: Sequence[int]) -> Any:
        """A value that `json.dumps` can write, of the type that the schema asks for, whatever the tokens are."""
        ...


@dataclass(frozen=True)
class ObjectReader:
    """A reader for each property."""

    parts: Mapping[str, Reader]

    def value(self, canvas: Sequence[int]) -> Any:
        return {name: part.value(canvas) for name, part in self.parts.items()}


@dataclass(frozen=True)
class ArrayReader:
    """A reader for each item."""

    parts: Sequence[Reader]

    def value(self, canvas: Sequence[int]) -> Any:
        return [part.value(canvas) for part in self.parts]


@dataclass(frozen=True)
class TextReader:
    """Text without markers; null where there is nothing but markers and that is allowed."""

    at: slice
    decoded: Callable[[Iterable[int]], str]
    null_marker: str
    nullable: bool

    def value(self, canvas: Sequence[int]) -> Any:
        text, marker = self.decoded(canvas[self.at]), self.null_marker
        pieces = text.split(marker)
        if len(pieces) > 1 and marker.startswith(pieces[-1].strip()):
            pieces[-1] = ""  # the slots ended within a marker
        rest = "".join(pieces).strip()
        return None if self.nullable and not rest and len(pieces) > 1 else rest


@dataclass(frozen=True)
class NumberReader:
    """The digits there are; without any, null where that is allowed and else 0."""

    at: slice
    decoded: Callable[[Iterable[int]], str]
    fraction: bool
    nullable: bool

    def value(self, canvas: Sequence[int]) -> Any:
        sign, whole, part = "", "", ""
        point = False
        for character in self.decoded(canvas[self.at]):
            if character in string.digits and point:
                part += character
            elif character in string.digits:
                whole += character
            elif character == "-" and not whole:
                sign = "-"
            elif character == "." and self.fraction:
                point = True
        if not whole + part:
            return None if self.nullable else 0
        number = f"{sign}{whole[: DIGITS_PER_TOKEN * MAX_DIGITS] or 0}"
        return float(f"{number}.{part or 0}") if self.fraction else int(number)


@dataclass(frozen=True)
class OptionsReader:
    """The option that most tokens agree with, the earliest among equals."""

    at: slice
    values: Sequence[Any]
    spelled: Sequence[Sequence[int]]

    def value(self, canvas: Sequence[int]) -> Any:
        held = canvas[self.at]
        agreeing = [sum(a == b for a, b in zip(tokens, held, strict=True)) for tokens in self.spelled]
        return self.values[agreeing.index(max(agreeing))]
