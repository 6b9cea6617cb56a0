"""Rewards for 4x4 Sudoku with one solution: the share of empty cells that are filled as in the solution.

`sudoku_compat` is the reward that d1 (arXiv 2504.12216) and its successors trained with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.columns import as_text
from rl4dlm.grading.text import last_answer_block, score_rows
from rl4dlm.tasks import grids
from rl4dlm.tasks.sudoku import cells_right


def sudoku(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    puzzle: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The share of empty cells that are right, in [0, 1]. Needs the columns `puzzle` and `solution`.

    0 unless the last `<answer>...</answer>` has 16 digits, in any layout, and keeps the clues. `None` where the row has
    no puzzle of 16 digits and a valid grid as its solution.
    """
    return score_rows("sudoku", _score, completions, {"puzzle": puzzle, "solution": solution})


def sudoku_compat(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    puzzle: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """d1's reward. It does not check the clues, pads a short answer with 0 and cuts a long one to 16 digits.

    A puzzle without an empty cell scores 0, and whatever Unicode calls a digit takes a cell.
    """
    return score_rows("sudoku_compat", _score_compat, completions, {"puzzle": puzzle, "solution": solution})


def _score(text: str, puzzle: Any, solution: Any) -> float | None:
    puzzle, solution = (as_text(value, digits=grids.CELLS) or "" for value in (puzzle, solution))
    if not grids.is_puzzle(puzzle) or not grids.is_valid(solution):
        return None
    cells = re.sub(r"[^0-9]", "", last_answer_block(text) or "")
    if len(cells) != grids.CELLS or any(clue not in ("0", cell) for cell, clue in zip(cells, puzzle, strict=True)):
        return 0.0
    right, empty = cells_right(cells, puzzle, solution)
    return right / empty if empty else 1.0


def _score_compat(text: str, puzzle: Any, solution: Any) -> float | None:
    puzzle, solution = (as_text(value, digits=grids.CELLS) or "" for value in (puzzle, solution))
    if min(len(puzzle), len(solution)) < grids.CELLS:
        return None
    cells = "".join(char for char in last_answer_block(text) or "" if char.isdigit())
    right, empty = cells_right(cells.ljust(grids.CELLS, "0"), puzzle, solution)
    return right / empty if cells and empty else 0.0
