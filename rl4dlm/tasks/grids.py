"""The 288 valid 4x4 Sudoku grids.

Owns their enumeration and the question which of them agree with some clues. A grid is a string of 16 digits 1 to 4, row
by row; a puzzle is one of 16 digits where 0 is an empty cell.
"""

from __future__ import annotations

import functools
import itertools

CELLS = 16

_UNITS = tuple(
    tuple(unit)
    for i in range(4)
    for unit in (
        range(4 * i, 4 * i + 4),
        range(i, CELLS, 4),
        [8 * (i // 2) + 2 * (i % 2) + offset for offset in (0, 1, 4, 5)],
    )
)


def is_valid(grid: str) -> bool:
    """Whether each of the 12 units (rows, columns, boxes) holds 1, 2, 3 and 4."""
    return len(grid) == CELLS and all(_holds_all(grid, unit) for unit in _UNITS)


def share_of_valid_units(grid: str, puzzle: str) -> float:
    """Share of the 12 units that hold 1, 2, 3 and 4; 0 unless there are 16 cells that keep the clues of a puzzle."""
    if len(grid) != CELLS or any(clue not in ("0", cell) for cell, clue in zip(grid, puzzle, strict=True)):
        return 0.0
    return sum(_holds_all(grid, unit) for unit in _UNITS) / len(_UNITS)


def solves(grid: str, puzzle: str) -> bool:
    """Whether a grid is valid and keeps the clues of a puzzle. A puzzle may have many such grids."""
    return is_valid(grid) and all(clue in ("0", cell) for cell, clue in zip(grid, puzzle, strict=True))


def is_puzzle(text: object) -> bool:
    """Whether this is a string of 16 digits 0 to 4."""
    return isinstance(text, str) and len(text) == CELLS and set(text) <= set("01234")


@functools.cache
def all_grids() -> tuple[str, ...]:
    """The valid grids in increasing order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    pairs = [up + low for up, low in itertools.product(rows, repeat=2) if len(set(up[:2] + low[:2])) == 4]
    return tuple(filter(is_valid, map("".join, itertools.product(pairs, repeat=2))))


def solutions(puzzle: str) -> list[str]:
    """The valid grids that keep the clues of a puzzle, in increasing order."""
    remaining = _remaining(puzzle)
    return [grid for index, grid in enumerate(all_grids()) if remaining >> index & 1]


def is_unique(puzzle: str) -> bool:
    """Whether exactly one valid grid keeps the clues of a puzzle."""
    return _remaining(puzzle).bit_count() == 1


def _holds_all(grid: str, unit: tuple[int, ...]) -> bool:
    return {grid[cell] for cell in unit} == set("1234")


def _remaining(puzzle: str) -> int:
    holding = _grids_holding()
    remaining = (1 << len(all_grids())) - 1
    for cell, clue in enumerate(puzzle):
        if clue != "0":
            remaining &= holding[cell, clue]
    return remaining


@functools.cache
def _grids_holding() -> dict[tuple[int, str], int]:
    """For each cell and digit, the set of grids with that digit there: bit i is the i-th of `all_grids`."""
    return {
        (cell, digit): sum(1 << index for index, grid in enumerate(all_grids()) if grid[cell] == digit)
        for cell in range(CELLS)
        for digit in "1234"
    }
