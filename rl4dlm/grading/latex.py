"""Whether two answers to a mathematical question are equal, by math-verify, outside this process.

Owns the worker pool in which LaTeX is parsed and compared: sympy may run for ever or exhaust memory on what a model
writes, so it never does in the process that trains. Comparison of strings is in `rl4dlm.grading.math_strings`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rl4dlm.grading.math_strings import is_equiv
from rl4dlm.grading.pool import WorkerPool

MAX_CHARACTERS = 1000  # of an answer; a longer one is not an answer but a text


def equivalent(pairs: Sequence[tuple[str, str]], *, deadline: float = 5.0) -> list[bool]:
    """For each `(gold, answer)` whether they are equal as mathematics.

    Equal normal forms of the strings are enough; the rest goes to math-verify, which finds nothing equal to a gold
    answer that it cannot parse.

    Args:
        pairs: LaTeX without delimiters, e.g. `(r"\\frac{1}{2}", "0.5")`.
        deadline: seconds for each pair. An answer that takes longer, or breaks the comparison, is not equal.
    """
    results = [is_equiv(gold, answer) for gold, answer in pairs]
    open_questions = [
        row for row, (_, answer) in enumerate(pairs) if not results[row] and 0 < len(answer) <= MAX_CHARACTERS
    ]
    if open_questions:
        outcomes = _pool().map([list(pairs[row]) for row in open_questions], deadline=deadline)
        for row, outcome in zip(open_questions, outcomes, strict=True):
            results[row] = outcome.value is True
    return results


def verify_pair(pair: Sequence[str]) -> bool:
    """What a worker runs: math-verify on one `(gold, answer)`, without time limits, which are the pool's."""
    from math_verify import parse, verify

    gold, answer = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in pair)
    return bool(verify(gold, answer, timeout_seconds=None))


@functools.cache
def _pool() -> WorkerPool:
    return WorkerPool("rl4dlm.grading.latex:verify_pair")
