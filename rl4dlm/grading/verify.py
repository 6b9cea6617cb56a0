"""Whether two answers are equal by math-verify. Imported by a sandbox's server, never by the process that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

RELATIVE = 1e-5  # by which two numbers may differ at most before math-verify is asked


def verify_pair(pair: Sequence[str]) -> bool:
    """math-verify on one `(gold, answer)`, without time limits, which are the sandbox's."""
    gold, answer = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in pair)
    return _near(gold, answer) and bool(verify(gold, answer, timeout_seconds=None))


def _near(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """False for two numbers that differ by more than their size allows: math-verify rounds to places, not digits."""
    values = []
    for parsed in (gold, answer):
        if not parsed or not getattr(parsed[0], "is_number", False) or not getattr(parsed[0], "is_real", False):
            return True
        values.append(parsed[0].evalf(30))
    first, second = values
    return bool(abs(first - second) <= RELATIVE * max(abs(first), abs(second)))


# What the libraries import and build when they are first used is there before a process is forked to compare answers.
for _pair in ((r"\frac{1}{2}", "0.25*2"), ("x^2+2x+1", "(x+1)^2"), (r"\{1,2\}", "(2,1)"), (r"\sqrt{2}", "1.41")):
    verify_pair(_pair)
