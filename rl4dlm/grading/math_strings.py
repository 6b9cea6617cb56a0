r"""Compares answers to competition mathematics as strings, in the way of the MATH benchmark (arXiv 2103.03874).

Owns the normalisation that published MATH numbers of d1 (arXiv 2504.12216) and its successors rest on, faults included:
it raises on some inputs, and `is_equiv` then compares the raw strings. Equality in mathematics is in
`rl4dlm.grading.latex`.
"""

from __future__ import annotations

import re

_BOX = "\\boxed"

# Applied in this order: what is dropped or respelled before units are looked for.
_RESPELLED = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip


def strip_string(text: str) -> str:
    r"""The normal form of a LaTeX answer.

    Drops line breaks, `\!`, `\left`, `\right`, degrees, dollar and percent signs, a trailing unit (`\text{ ...`), a
    short left-hand side (`x=`) and spaces; writes `tfrac` and `dfrac` as `frac`, `\frac12` as `\frac{1}{2}`, `\sqrt3`
    as `\sqrt{3}`, `.5` as `0.5`, `0.5` as a fraction and `a/b` of two integers too.

    Raises:
        IndexError: nothing follows a `\frac` or a `\sqrt`.
        ValueError: the text is `a/b` and a or b is no integer.
        AssertionError: more than one `\text{ `.
    """
    for old, new in _RESPELLED:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise AssertionError("more than one unit")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text == "":
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    return _slash_to_fraction("\\frac{1}{2}" if text == "0.5" else text)


def is_equiv(first: str | None, second: str | None) -> bool:
    """Whether two answers have the same normal form, or are the same string where one has none. `None` is itself."""
    if first is None or second is None:
        return first is second
    try:
        return strip_string(first) == strip_string(second)
    except (IndexError, ValueError, AssertionError):
        return first == second


def last_boxed_only_string(text: str) -> str | None:
    r"""The last `\boxed{...}` or `\fbox{...}` with its braces; the whole text without one; `None` if it never closes.

    A `\boxed ` followed by a space comes first wherever it stands, and runs to the next `$`.
    """
    if _BOX + " " in text:
        return _BOX + " " + text.rpartition(_BOX + " ")[2].partition("$")[0]
    start = text.rfind(_BOX)
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0 and brace.group() == "}":
            return text[start : start + brace.end()]
    return None


def remove_boxed(text: str | None) -> str:
    r"""What is inside a `\boxed{...}` that the whole text is; any other text unchanged.

    Raises:
        TypeError: `None`, the box that never closes.
        AssertionError: there is a `\boxed ` and the text does not begin with it.
    """
    if text is None:
        raise TypeError("a box that never closes has no content")
    if _BOX + " " in text:
        if not text.startswith(_BOX + " "):
            raise AssertionError("the box does not come first")
        return text[len(_BOX) + 1 :]
    if text.startswith(_BOX + "{") and text.endswith("}"):
        return text[len(_BOX) + 1 : -1]
    return text


def _brace_roots(text: str) -> str:
    head, *rest = text.split("\\sqrt")
    return head + "".join("\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in rest)


def _brace_fractions(text: str) -> str:
    head, *rest = text.split("\\frac")
    pieces = [head]
    for part in rest:
        if part[0] != "{":
            if len(part) < 2:
                return text
            numerator, denominator, tail = part[0], part[1], part[2:]
            part = "{" + numerator + "}" + (denominator if denominator == "{" else "{" + denominator + "}") + tail
        pieces.append(part)
    return "\\frac".join(pieces)


def _slash_to_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    numerator, denominator = int(parts[0]), int(parts[1])
    return f"\\frac{{{numerator}}}{{{denominator}}}" if text == f"{numerator}/{denominator}" else text
