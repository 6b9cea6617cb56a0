"""The grids are those the rules allow, and uniqueness is what a search finds."""

from __future__ import annotations

import random

import pytest

from rl4dlm.tasks import grids


def _keeps_the_rules(cells: list[str], cell: int) -> bool:
    row, column = divmod(cell, 4)
    for other in range(16):
        other_row, other_column = divmod(other, 4)
        same_unit = (
            row == other_row or column == other_column or (row // 2, column // 2) == (other_row // 2, other_column // 2)
        )
        if other != cell and same_unit and cells[other] == cells[cell]:
            return False
    return True


def _search(cells: list[str]) -> list[str]:
    """All completions, cell by cell, by the rules of Sudoku alone."""
    if "0" not in cells:
        return ["".join(cells)]
    cell = cells.index("0")
    found = []
    for digit in "1234":
        cells[cell] = digit
        if _keeps_the_rules(cells, cell):
            found += _search(cells)
    cells[cell] = "0"
    return found


def test_all_grids_are_the_288_that_a_search_finds() -> None:
    found = _search(["0"] * 16)
    assert len(found) == 288
    assert grids.all_grids() == tuple(sorted(found))
    assert all(map(grids.is_valid, found))


@pytest.mark.parametrize("seed", range(30))
def test_solutions_and_uniqueness_by_search(seed: int) -> None:
    rng = random.Random(seed)
    solution = rng.choice(grids.all_grids())
    shown = rng.sample(range(16), rng.randint(2, 10))
    puzzle = "".join(digit if cell in shown else "0" for cell, digit in enumerate(solution))
    found = _search(list(puzzle))
    assert grids.solutions(puzzle) == sorted(found)
    assert grids.is_unique(puzzle) == (len(found) == 1)


def test_changing_one_cell_of_a_valid_grid_breaks_it() -> None:
    grid = grids.all_grids()[100]
    for cell in range(16):
        for digit in "01234x²":
            changed = grid[:cell] + digit + grid[cell + 1 :]
            assert grids.is_valid(changed) == (digit == grid[cell])


@pytest.mark.parametrize("text", ["", "1234", "1" * 16, "1234" * 4, "12343412214343210"])
def test_not_valid(text: str) -> None:
    assert not grids.is_valid(text)


def test_solves_needs_the_clues() -> None:
    first, second = grids.all_grids()[:2]
    assert grids.solves(first, "0" * 16) and grids.solves(first, first)
    assert not grids.solves(first, second)
