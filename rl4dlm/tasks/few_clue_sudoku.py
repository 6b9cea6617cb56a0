"""4x4 Sudoku with 2 to 6 clues, where most puzzles have many answers: the task of the demo.

Owns its generator and checker. Any grid that keeps the clues and the rules is right, so a model that commits several
cells at once from independent guesses fails where the guesses do not fit together. That is what the task measures.

Splits are by puzzle: a puzzle's checksum decides whether it belongs to training, validation (for choosing settings and
checkpoints) or test. They share no puzzle. They do share grids: there are only 288, and all of them may occur in
training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_text
from rl4dlm.tasks import grids
from rl4dlm.tasks.base import Row, Task, check_size, gather, split_of

_DEFAULT_SIZE = {"train": 20_000, "validation": 500, "test": 1000}


@dataclass(frozen=True)
class FewClueSudoku(Task):
    """Rows `prompt` (the puzzle in brackets), `puzzle` (16 characters, 0 for an empty cell), `solution` (one answer).

    The brackets give a model with relative positions something to count the cells from.

    The answer is 16 characters, one per cell, so a tokenizer of single characters fits. Training rows are drawn
    independently: a puzzle may return with another solution, which for supervised training is what makes the many
    answers visible, each equally often. Validation and test rows are distinct puzzles.

    Args:
        size: rows of a split; by default 20,000 for training, 500 for validation, 1,000 for test.
        seed: which rows are drawn. It moves no puzzle from one split to another.
        min_clues: fewest clues; their number is uniform.
        max_clues: most clues.
    """

    name: ClassVar[str] = "few_clue_sudoku"

    size: int | None = None
    seed: int = 0
    min_clues: int = 2
    max_clues: int = 6

    def __post_init__(self) -> None:
        check_size(self.size)
        if not 0 <= self.min_clues <= self.max_clues < grids.CELLS:
            raise ValueError(
                f"min_clues={self.min_clues}, max_clues={self.max_clues}; needed: 0 <= min_clues <= max_clues <= 15"
            )

    def _rows(self, split: str) -> list[Row]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        seen: set[str] = set()

        def draw() -> Row | None:
            solution = rng.choice(grids.all_grids())
            shown = set(rng.sample(range(grids.CELLS), rng.randint(self.min_clues, self.max_clues)))
            puzzle = "".join(digit if cell in shown else "0" for cell, digit in enumerate(solution))
            if split_of(puzzle) != split or (split != "train" and puzzle in seen):
                return None
            seen.add(puzzle)
            return {"prompt": f"[{puzzle}]", "puzzle": puzzle, "solution": solution}

        what = f"{split} puzzles with {self.min_clues} to {self.max_clues} clues"
        return gather(draw, self.size or _DEFAULT_SIZE[split], what)

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the completion, white space aside, is a valid grid that keeps the clues; `None` without a puzzle."""
        return solves_text(completion, row.get("puzzle"))


def solves_text(completion: str, puzzle: Any) -> bool | None:
    """Whether all of a completion, white space aside, is a valid grid that keeps the clues; `None` without a puzzle."""
    puzzle = as_text(puzzle, digits=grids.CELLS)
    if puzzle is None or not grids.is_puzzle(puzzle):
        return None
    return grids.solves("".join(completion.split()), puzzle)
