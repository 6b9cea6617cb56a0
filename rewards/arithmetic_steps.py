"""Rewards for arithmetic worked out line by line: 1 for the right answer and 0 for anything else, or a share of steps.

`steps` pays for right work under a wrong answer, so a group without a right answer teaches something too. Alone it
would not ask for an answer at all; give it the smaller weight beside `arithmetic_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.text import score_rows
from rl4dlm.tasks.arithmetic_steps import solves, steps_right


def arithmetic_steps(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """1 or 0; `None` where the row's answer is no number. Needs the column `answer`."""
    return score_rows("arithmetic_steps", _score, completions, {"answer": answer})


def steps(
    prompts: Sequence[Any], completions: Sequence[Any], expression: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """The share of the steps that is there and right, 0 to 1; 1 is all steps and no other line.

    See `rl4dlm.tasks.arithmetic_steps.steps_right`. `None` where the row has no expression. Needs the column
    `expression`.
    """
    return score_rows("arithmetic_steps:steps", steps_right, completions, {"expression": expression})


def _score(text: str, answer: Any) -> float | None:
    solved = solves(text, answer)
    return None if solved is None else float(solved)
