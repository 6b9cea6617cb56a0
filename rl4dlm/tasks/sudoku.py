"""4x4 Sudoku with one solution, as in d1 (arXiv 2504.12216) and SPG (arXiv 2510.09541).

Owns the generator, the reader of the papers' CSV files, the split, and the checker. There are only 288 grids, so a
split by puzzle lets a model learn all answers; d1's training file holds every one of them. The split here is by
solution, SPG's: 200 grids for training, 88 for test, and the 88 are those of SPG's published test file. Numbers on the
two papers' files are not comparable. Of d1's 500 test puzzles 124 have more than one solution; SPG's 256 have one each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_text
from rl4dlm.grading.text import answer_or_text
from rl4dlm.tasks import grids, prompts
from rl4dlm.tasks.base import Row, Task, check_size, check_style, gather, share, tenth
from rl4dlm.tasks.files import Paths, files_by_split, read_rows

_DEFAULT_SIZE = {"train": 10_000, "validation": 256, "test": 256}

# Bit i says that the i-th of `grids.all_grids()` solves a puzzle of SPG's test file.
_TEST_GRIDS = 0x160201202854217B402929548040D833A406F80254CB684A450C880381880BCA003220


@dataclass(frozen=True)
class Sudoku(Task):
    """Rows `prompt` (chat messages), `puzzle` and `solution` (16 digits each).

    Generated puzzles are distinct, have exactly one solution, and leave out those that the prompts of SPG and ESPO show
    solved.
    Validation puzzles share the 200 training grids, but no puzzle; test puzzles share neither.

    Args:
        style: of the prompt: "d1", zero-shot, "spg", three solved puzzles first, or "espo", one.
        size: rows of a split; by default 10,000 for training, 256 for validation and test, and a whole file.
        seed: which puzzles are drawn. It moves no grid from one split to another.
        path: a CSV, JSON, JSONL or parquet file with columns `Puzzle` and `Solution` for the test split, or a mapping
            from splits to files. Splits without a file are generated, and leave out the puzzles of the files.
        min_clues: fewest clues of a generated puzzle, at least 4; their number is uniform.
        max_clues: most clues of a generated puzzle.
    """

    name: ClassVar[str] = "sudoku"

    style: str = "d1"
    size: int | None = None
    seed: int = 0
    path: Paths = None
    min_clues: int = 4
    max_clues: int = 9

    def __post_init__(self) -> None:
        check_style(self.style, prompts.STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)
        if not 4 <= self.min_clues <= self.max_clues < grids.CELLS:
            raise ValueError(
                f"min_clues={self.min_clues}, max_clues={self.max_clues}; needed: 4 <= min_clues <= max_clues <= 15"
            )

    @property
    def protocol(self) -> str:
        """How many solved puzzles are shown, and that those of the split share no grid with training."""
        shots = {"d1": "0-shot", "spg": "3-shot", "espo": "1-shot"}[self.style]
        if self.path is not None:
            return f"{shots}, puzzles of a file"
        return f"{shots}, leak-free: test grids are no training grids, and no puzzle of a prompt is asked"

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)
        if split in files:
            pairs = _read(files[split])[: self.size]
        else:
            taken = {puzzle for file in files.values() for puzzle, _ in _read(file)}
            pairs = self._generate(split, {*taken, *prompts.ALL_SHOWN_PUZZLES})
        return [
            {
                "prompt": prompts.sudoku(puzzle, style=self.style, evaluation=split != "train"),
                "puzzle": puzzle,
                "solution": solution,
            }
            for puzzle, solution in pairs
        ]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer is a valid grid that keeps the clues; `None` without a puzzle."""
        puzzle = as_text(row.get("puzzle"), digits=grids.CELLS)
        if puzzle is None or not grids.is_puzzle(puzzle):
            return None
        return grids.solves(read_cells(completion), puzzle)

    def metrics(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """`solved`, and `cell_accuracy`, which the papers report: right cells over empty cells, over all puzzles."""
        counts = [
            cells_right(read_cells(completion), row["puzzle"], row["solution"])
            for completion, row in zip(completions, rows, strict=True)
        ]
        accuracy = share(sum(right for right, _ in counts), sum(empty for _, empty in counts))
        return {**super().metrics(completions, rows), "cell_accuracy": accuracy}

    def _generate(self, split: str, taken: set[str]) -> list[tuple[str, str]]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        train_grids, test_grids = solution_split()
        choices = test_grids if split == "test" else train_grids

        def draw() -> tuple[str, str] | None:
            solution = rng.choice(choices)
            shown = set(rng.sample(range(grids.CELLS), rng.randint(self.min_clues, self.max_clues)))
            puzzle = "".join(digit if cell in shown else "0" for cell, digit in enumerate(solution))
            other_split = split != "test" and (tenth(puzzle) == 0) != (split == "validation")
            if puzzle in taken or other_split or not grids.is_unique(puzzle):
                return None
            taken.add(puzzle)
            return puzzle, solution

        what = f"{split} puzzles with {self.min_clues} to {self.max_clues} clues"
        return gather(draw, self.size or _DEFAULT_SIZE[split], what)


def solution_split() -> tuple[list[str], list[str]]:
    """The 200 solution grids of training and validation, and the 88 of test."""
    train: list[str] = []
    test: list[str] = []
    for index, grid in enumerate(grids.all_grids()):
        (test if _TEST_GRIDS >> index & 1 else train).append(grid)
    return train, test


def read_cells(completion: str) -> str:
    """The digits that a completion answers: those after `<answer>`, else its last run of 16 digits, else none."""
    if "<answer>" in completion:
        return re.sub(r"[^0-9]", "", answer_or_text(completion))
    runs = re.findall(r"(?<![0-9])[0-9]{16}(?![0-9])", completion)
    return runs[-1] if runs else ""


def cells_right(cells: str, puzzle: str, solution: str) -> tuple[int, int]:
    """How many empty cells of a puzzle are filled as in its solution, and how many there are.

    Missing cells count as wrong and surplus digits are not read, as in d1's evaluation.
    """
    empty = [cell for cell in range(grids.CELLS) if puzzle[cell] == "0"]
    return sum(cells[cell : cell + 1] == solution[cell] for cell in empty), len(empty)


def _read(file: Path) -> list[tuple[str, str]]:
    rows = read_rows(file, "Puzzle", "Solution")
    for number, row in enumerate(rows, start=1):
        if not grids.is_puzzle(row["Puzzle"]) or not grids.is_valid(str(row["Solution"])):
            raise ValueError(
                f"{file}: row {number} is no puzzle of 16 digits with a valid grid as its solution: "
                f"{row['Puzzle']!r}, {row['Solution']!r}"
            )
    return [(row["Puzzle"], str(row["Solution"])) for row in rows]
