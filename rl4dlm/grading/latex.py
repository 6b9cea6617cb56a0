"""Whether two answers to a mathematical question are equal, by math-verify, outside this process.

Owns what is asked of math-verify (`rl4dlm.grading.verify`), and where: sympy may run for ever, exhaust memory, or
evaluate what a model writes, so it meets it in the sandbox's processes and not in the one that trains. Comparison of
strings is in `rl4dlm.grading.math_strings`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from rl4dlm.grading.math_strings import is_equiv
from rl4dlm.grading.workers import WorkerPool

MAX_CHARACTERS = 1000  # of an answer; a longer one is not an answer but a text


def equivalent(pairs: Sequence[tuple[str, str]], *, deadline: float = 5.0) -> list[bool | None]:
    """For each `(gold, answer)` whether they are equal as mathematics.

    Equal normal forms of the strings are enough, where the normaliser drops no more than a unit or a variable; the rest
    goes to math-verify, which finds nothing equal to a gold answer that it cannot parse, unless it is known to read
    such answers as something else. Of a chain of equations every side must equal the gold answer.

    Args:
        pairs: LaTeX without delimiters, e.g. `(r"\\frac{1}{2}", "0.5")`.
        deadline: seconds for each pair. An answer that takes longer, or breaks the comparison, is not equal.

    Returns:
        For each pair True or False, or None where it was not compared: the batch's time went to others, or there was no
        process for it.
    """
    pairs = [(gold, plain(answer)) for gold, answer in pairs]
    results: list[bool | None] = [same_form(gold, answer) for gold, answer in pairs]
    asked: list[list[str]] = []
    parts: list[tuple[int, int]] = []  # of a row: where its questions begin, and how many it has
    for row, (gold, answer) in enumerate(pairs):
        sides = sides_of(gold, answer) if 0 < len(answer) <= MAX_CHARACTERS and comparable(gold, answer) else []
        open_sides = [] if results[row] else [side for side in sides if not same_form(gold, side)]
        results[row] = results[row] or bool(sides)
        parts.append((len(asked), len(open_sides)))
        asked.extend([gold, side] for side in open_sides)
    if asked:
        outcomes = _pool().map(asked, deadline=deadline)
        for row, (start, count) in enumerate(parts):
            if results[row] and count:
                found = outcomes[start : start + count]
                wrong = any(outcome.value is not True and not outcome.lost for outcome in found)
                results[row] = None if not wrong and any(outcome.lost for outcome in found) else not wrong
    return results


def plain(answer: str) -> str:
    r"""An answer without what says nothing: a degree sign, and a number's unit where both are in one `\text{}`."""
    answer = answer.strip().replace("°", r"^\circ")
    wrapped = _ALL_TEXT.fullmatch(answer)
    if wrapped is None:
        return answer
    measured = _MEASURED.fullmatch(wrapped[1].strip())
    return measured[1] if measured and not _ALTERNATIVES.search(wrapped[1]) else answer


def same_form(gold: str, answer: str) -> bool:
    r"""Whether two answers have equal normal forms, and the normaliser dropped nothing of the second that counts.

    It drops whatever follows `\text{ ` and any left side of two characters; that must be a unit and a variable here.
    """
    if "".join(gold.split()) == "".join(answer.split()):
        return True
    if not is_equiv(gold, answer):
        return False
    _, found, unit = answer.partition(r"\text{ ")
    if found and (not _UNIT.fullmatch(unit) or _ALTERNATIVES.search(unit)):
        return False
    left, equals, _ = answer.partition("=")
    return not equals or gold.count("=") == answer.count("=") or bool(_VARIABLE.fullmatch(left))


def comparable(gold: str, answer: str) -> bool:
    """Whether math-verify may be asked: not where it would read another kind of thing as the same.

    It reads a list with dots as its visible members, a tuple as a set, letters as their product, in any order, and one
    of several alternatives as the answer.
    """
    if _TEXT_WITH_DIGITS.search(answer) and "".join(gold.split()) != "".join(answer.split()):
        return False
    if _DOTS.search(gold) or _DOTS.search(answer):
        return False
    if _ALTERNATIVES.search(answer) and not _ALTERNATIVES.search(gold) and "," not in gold:
        return False
    brackets, own = _brackets(gold), _brackets(answer)
    if "," in gold and "," in answer and brackets and own and brackets != own:
        return False
    letters, spelled = _letters(gold), _letters(answer)
    return letters is None or spelled is None or letters == spelled


def sides_of(gold: str, answer: str) -> list[str]:
    """What of an answer must equal the gold one: all sides of a chain of equations but names of variables."""
    if "=" in gold or "=" not in answer or _RELATION.search(answer):
        return [answer]
    sides = [side.strip() for side in answer.split("=")]
    return [] if not all(sides) else [side for side in sides if not _VARIABLE.fullmatch(side)]


_ALL_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
_TEXT_WITH_DIGITS = re.compile(r".\\(?:text|textbf|mathrm|mbox)\{[^{}]*\d[^{}]*\}")
_MEASURED = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)\s+[A-Za-z]{2,}(?:\s+[A-Za-z]+)*\.?")
_UNIT = re.compile(r"[A-Za-z./\s-]*\}?(?:\^\{?\d\}?)?\$?")
_ALTERNATIVES = re.compile(r"\b(?:or|and|either|maybe|not|if)\b|\\(?:lor|land|vee|wedge)(?![A-Za-z])")
_VARIABLE = re.compile(r"\s*(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z0-9,]+\))?\s*")
_DOTS = re.compile(r"\\[lcd]?dots(?![A-Za-z])|\.\.\.|…")
_RELATION = re.compile(r"[<>≤≥≠]|[!:]=|\\(?:leq?|geq?|neq?|lt|gt|approx)(?![A-Za-z])")


def _brackets(text: str) -> str:
    """The outermost pair of brackets, `""` where there is none."""
    inner = text.replace(r"\left", "").replace(r"\right", "").replace(r"\{", "{").replace(r"\}", "}").strip()
    pair = inner[:1] + inner[-1:]
    return pair if pair in ("()", "[]", "{}", "(]", "[)") else ""


def _letters(text: str) -> str | None:
    """A text that is nothing but two or more letters, without spaces; None for others."""
    inner = re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    inner = "".join(inner.split())
    return inner if len(inner) > 1 and inner.isalpha() else None


@functools.cache
def _pool() -> WorkerPool:
    return WorkerPool("rl4dlm.grading.verify:verify_pair", preload=("math_verify",))
