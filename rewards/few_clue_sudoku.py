"""Reward for few-clue Sudoku: 1 for any valid grid that keeps the clues, 0 for anything else.

Paying part of it for a grid that is nearly valid rewards wrong grids, which taught a small model to make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.text import score_rows
from rl4dlm.tasks.few_clue_sudoku import solves_text


def few_clue_sudoku(
    prompts: Sequence[Any], completions: Sequence[Any], puzzle: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """1 or 0; `None` where the row's puzzle is missing. Needs the column `puzzle`."""
    return score_rows("few_clue_sudoku", _score, completions, {"puzzle": puzzle})


def _score(text: str, puzzle: str) -> float | None:
    solved = solves_text(text, puzzle)
    return None if solved is None else float(solved)
