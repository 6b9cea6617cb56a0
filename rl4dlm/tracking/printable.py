"""What a model wrote, made harmless for a terminal: nothing in it moves the cursor, sets a title or the clipboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def printable(text: str) -> str:
    r"""The text with what is not printable as escapes such as `\x1b`; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_entries(value: Any) -> Any:
    """`printable` of every text in lists and mappings, such as chat messages; other values as they are."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_entries(key): printable_entries(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [printable_entries(entry) for entry in value]
    return value
