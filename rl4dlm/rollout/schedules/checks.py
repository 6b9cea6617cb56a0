"""Checks that settings of several schedules share."""

from __future__ import annotations

import math
from typing import Any


def check_number(arguments: object, name: str, low: float, high: float = math.inf) -> None:
    """Raises ValueError unless a setting is a number from `low` to `high`, which may be infinite."""
    value: Any = getattr(arguments, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f"{low:g} or larger" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is not allowed; it must be a number, {limits}")


def check_count(arguments: object, name: str, low: int) -> None:
    """Raises ValueError unless a setting is an integer of at least `low`."""
    value: Any = getattr(arguments, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, {low} or larger")


def check_flag(arguments: object, name: str) -> None:
    """Raises ValueError unless a setting is True or False."""
    value: Any = getattr(arguments, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed; it must be True or False")
