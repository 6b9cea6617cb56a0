"""Rewards for few-clue Sudoku: 1 for a valid grid that keeps the clues and 0 for anything else, or the share of units.

`units` pays for what is right in a wrong grid, so a group without a solved puzzle teaches something too. Alone it would
also reward wrong grids; give it the smaller weight beside `few_clue_sudoku`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.columns import as_text
from rl4dlm.grading.text import score_rows
from rl4dlm.tasks import grids
from rl4dlm.tasks.few_clue_sudoku import solves_text


def few_clue_sudoku(
    prompts: Sequence[Any], completions: Sequence[Any], puzzle: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """1 or 0; `None` where the row's puzzle is missing. Needs the column `puzzle`."""
    return score_rows("few_clue_sudoku", _score, completions, {"puzzle": puzzle})


def units(
    prompts: Sequence[Any], completions: Sequence[Any], puzzle: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """Share of the 12 rows, columns and boxes that are right, 0 to 1; 0 where a clue is changed. Needs `puzzle`."""
    return score_rows("few_clue_sudoku:units", _units, completions, {"puzzle": puzzle})


def _units(text: str, puzzle: Any) -> float | None:
    puzzle = as_text(puzzle, digits=grids.CELLS)
    return grids.share_of_valid_units("".join(text.split()), puzzle) if grids.is_puzzle(puzzle) else None


def _score(text: str, puzzle: Any) -> float | None:
    solved = solves_text(text, puzzle)
    return None if solved is None else float(solved)
