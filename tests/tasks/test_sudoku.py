"""Unique-solution Sudoku: splits by solution, SPG's own test grids, exact checks, the papers' files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rl4dlm.tasks import grids, load_task, prompts
from rl4dlm.tasks.files import read_rows
from rl4dlm.tasks.sudoku import cells_right, read_cells, solution_split

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: load_task("sudoku", size=600).rows(split) for split in SPLITS}


def test_every_puzzle_has_its_solution_and_no_other(rows: dict[str, list[dict]]) -> None:
    for row in (row for split in SPLITS for row in rows[split]):
        assert grids.solutions(row["puzzle"]) == [row["solution"]]


def test_split_is_by_solution_200_and_88(rows: dict[str, list[dict]]) -> None:
    train, test = solution_split()
    assert (len(train), len(test)) == (200, 88)
    assert set(train) | set(test) == set(grids.all_grids())
    assert {row["solution"] for split in ("train", "validation") for row in rows[split]} <= set(train)
    assert {row["solution"] for row in rows["test"]} == set(test)


def test_no_puzzle_is_in_two_splits_or_twice_in_one_or_in_the_prompt(rows: dict[str, list[dict]]) -> None:
    puzzles = [row["puzzle"] for split in SPLITS for row in rows[split]] + list(prompts.SHOWN_PUZZLES)
    assert len(set(puzzles)) == len(puzzles)


def test_validation_puzzles_of_one_seed_are_no_training_puzzles_of_another(rows: dict[str, list[dict]]) -> None:
    other = load_task("sudoku", size=2000, seed=1).rows("train")
    assert not {row["puzzle"] for row in other} & {row["puzzle"] for row in rows["validation"]}


def test_rows_follow_the_seed() -> None:
    task = load_task("sudoku", size=30)
    assert task.rows("train") == task.rows("train")
    assert task.rows("train") != load_task("sudoku", size=30, seed=1).rows("train")


def test_check_accepts_the_solution_alone(rows: dict[str, list[dict]]) -> None:
    task = load_task("sudoku")
    for row in rows["test"][:20]:
        for grid in grids.all_grids():
            assert task.check(f"<answer>\n{grid}\n</answer>", row) == (grid == row["solution"])
    assert task.check("<answer>1</answer>", {}) is None


@pytest.mark.parametrize(
    ("completion", "cells"),
    [
        ("<reasoning>1234</reasoning>\n<answer>\n1234 3412\n2143 4321\n</answer>", "1234341221434321"),
        ("<answer>1</answer><answer>23</answer>", "23"), ("<answer>12", "12"),
        ("1234341221434321 is it", "1234341221434321"),
        ("12343412214343211", ""), ("", ""),
    ],
)  # fmt: skip
def test_cells_are_read_from_the_answer(completion: str, cells: str) -> None:
    assert read_cells(completion) == cells


def test_cell_accuracy_is_pooled_over_puzzles() -> None:
    task = load_task("sudoku")
    solution = "1243342141322314"
    easy, hard = "1243342141322310", "0" * 16
    rows = [{"puzzle": easy, "solution": solution}, {"puzzle": hard, "solution": solution}]
    assert cells_right("1243", easy, solution) == (0, 1)
    assert cells_right("1243", hard, solution) == (4, 16)
    completions = [f"<answer>{solution}</answer>", "<answer>1243</answer>"]
    assert task.metrics(completions, rows) == {"solved": 0.5, "cell_accuracy": 5 / 17}


def test_styles() -> None:
    task, few_shot = load_task("sudoku", size=1), load_task("sudoku", size=1, style="spg")
    (row,), (shown,) = task.rows("train"), few_shot.rows("train")
    assert row["puzzle"] == shown["puzzle"]
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert re.findall(r"Sudoku puzzle: (\d{16})", row["prompt"][0]["content"]) == [row["puzzle"]]
    assert re.findall(r"Sudoku puzzle: (\d{16})", shown["prompt"][0]["content"]) == [
        *prompts.SHOWN_PUZZLES,
        row["puzzle"],
    ]
    (held_out,) = task.rows("test")
    assert held_out["prompt"][-1] == {"role": "assistant", "content": "<reasoning>"}


def test_solved_examples_in_the_prompt_are_right() -> None:
    text = prompts.sudoku("0" * 16, style="spg", evaluation=False)[0]["content"]
    examples = text.split("Question:\n")[1:]
    assert len(examples) == 3
    for puzzle, example in zip(prompts.SHOWN_PUZZLES, examples, strict=True):
        cells = list(puzzle)
        for row, column, digit in re.findall(r"R(\d)C(\d) can only be (\d)", example):
            cell = 4 * (int(row) - 1) + int(column) - 1
            # The digits that the rules leave for a cell whose row, column and box are as filled so far.
            possible = [d for d in "1234" if all(_differ(cell, other) or cells[other] != d for other in range(16))]
            assert cells[cell] == "0" and possible == [digit]
            cells[cell] = digit
        assert grids.solutions(puzzle) == ["".join(cells)]
        assert f"<answer>\n{''.join(cells)}\n</answer>" in example


def _differ(cell: int, other: int) -> bool:
    (row, column), (other_row, other_column) = divmod(cell, 4), divmod(other, 4)
    return (
        row != other_row and column != other_column and (row // 2, column // 2) != (other_row // 2, other_column // 2)
    )


def test_file_of_one_split_is_kept_out_of_the_others(tmp_path: Path) -> None:
    generated = load_task("sudoku", size=50).rows("train")
    path = tmp_path / "mine.csv"
    path.write_text("Puzzle,Solution\n" + "".join(f"{row['puzzle']},{row['solution']}\n" for row in generated))
    task = load_task("sudoku", size=50, path=path)
    assert [row["puzzle"] for row in task.rows("test")] == [row["puzzle"] for row in generated]
    assert not {row["puzzle"] for row in task.rows("train")} & {row["puzzle"] for row in generated}


@pytest.mark.parametrize(
    "line", ["123,1234341221434321", "0000000000000000,1111111111111111", "000000000000000x,1234341221434321"]
)
def test_file_with_a_wrong_row_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"Puzzle,Solution\n3102200002100320,3142243142131324\n{line}\n")
    with pytest.raises(ValueError, match=r"bad\.csv: row 2"):
        load_task("sudoku", path=path).rows("test")


def test_papers_files(shared_dir: Path) -> None:
    spg, d1 = (shared_dir / "data" / f"sudoku4x4_test_{name}.csv" for name in ("spg", "d1"))
    if not (spg.is_file() and d1.is_file()):
        pytest.skip("the papers' files are absent")
    spg_rows, d1_rows = (load_task("sudoku", path=path).rows("test") for path in (spg, d1))
    assert (len(spg_rows), len(d1_rows)) == (256, 500)
    # SPG's test solutions are exactly this library's, so that its file never leaks into generated training puzzles.
    assert {row["solution"] for row in spg_rows} == set(solution_split()[1])
    assert sum(not grids.is_unique(row["puzzle"]) for row in spg_rows) == 0
    assert sum(not grids.is_unique(row["puzzle"]) for row in d1_rows) == 124
    assert len(read_rows(d1, "Puzzle", "Solution")) == 500
