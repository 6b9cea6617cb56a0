"""Rewards for Countdown: 1 for the target, a little for the right numbers.

`countdown_compat` is the reward that d1 (arXiv 2504.12216) and its successors trained with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.columns import as_integer, as_integers
from rl4dlm.grading.expression import ExpressionError, evaluate_like_python
from rl4dlm.grading.text import last_answer_block, score_rows
from rl4dlm.tasks.countdown import judge, read_answer

FORMAT_SCORE = 0.1


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int] | None] | None = None,
    target: Sequence[int | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 if the last `<answer>...</answer>` reaches the target with exactly the numbers, 0.1 if only the numbers are
    right.

    0 otherwise. Arithmetic is exact. Needs the columns `numbers` and `target`.
    """
    return score_rows("countdown", _score, completions, {"numbers": numbers, "target": target})


def countdown_compat(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int] | None] | None = None,
    target: Sequence[int | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """d1's reward: 0 without a complete answer, 1 within 1e-5 of the target, 0.1 in every other case, wrong numbers
    included.

    Python's arithmetic decides: `**` and `//` count, `3.0` uses the numbers 3 and 0, a target that is a string is never
    met.
    """
    return score_rows("countdown_compat", _score_compat, completions, {"numbers": numbers, "target": target})


def _score(text: str, numbers: Any, target: Any) -> float | None:
    given, wanted = as_integers(numbers), as_integer(target)
    if given is None or wanted is None:
        return None
    answer = read_answer(text)
    if answer is None:
        return 0.0
    judgement = judge(answer, given, wanted)
    return 1.0 if judgement.solved else FORMAT_SCORE * judgement.numbers_right


def _score_compat(text: str, numbers: Sequence[int], target: int) -> float | None:
    answer = last_answer_block(text)
    if answer is None:
        return 0.0
    try:
        if sorted(int(number) for number in re.findall(r"\d+", answer)) != sorted(numbers):
            return FORMAT_SCORE
        return 1.0 if abs(evaluate_like_python(answer) - target) < 1e-5 else FORMAT_SCORE
    except (ExpressionError, ValueError, TypeError, OverflowError):
        return FORMAT_SCORE
