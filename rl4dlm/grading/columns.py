"""What a dataset's columns say, whatever type a JSON, CSV or parquet reader gave them (A5).

Owns the reading of reference values for rewards and checkers: text, whole numbers and lists of them. What a model wrote
is read by `rl4dlm.grading.text`.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any


def as_text(value: Any, digits: int = 0) -> str | None:
    """A value as text; None for None, NaN and blank text.

    Args:
        value: text, or a number: a whole one is written without a decimal point, as the file that it came from had it.
        digits: a whole number gets leading zeros up to so many digits, which a reader of CSV files drops.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, numbers.Real) and str(value) not in ("True", "False"):
        if isinstance(value, numbers.Integral):
            return str(int(value)).zfill(digits)
        number = float(value)
        return str(int(number)).zfill(digits) if number.is_integer() else repr(number)
    text = str(value)
    return text if text.strip() else None


def as_integer(value: Any) -> int | None:
    """A whole number, given as one or as text; None for anything else."""
    text = as_text(value)
    return int(text) if text is not None and re.fullmatch(r"\s*[+-]?\d{1,300}\s*", text) else None


def as_integers(value: Any) -> list[int] | None:
    """A list of whole numbers, given as one, or as text such as `[2, 3]` or `2 3`; None for anything else."""
    if isinstance(value, str):
        if not re.fullmatch(r"[\[(]?[\s,+\-\d]*[\])]?", value.strip()):
            return None
        value = re.findall(r"[+-]?\d{1,300}", value)
    if not isinstance(value, Sequence) and not hasattr(value, "tolist"):
        return None
    found = [as_integer(entry) for entry in (value.tolist() if hasattr(value, "tolist") else value)]
    return [number for number in found if number is not None] if found and None not in found else None
