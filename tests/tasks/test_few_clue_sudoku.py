"""The demo's task: its splits share no puzzle, and its checker accepts exactly the grids that a search finds."""

from __future__ import annotations

import itertools
import random
import zlib

import pytest

from rl4dlm.tasks import grids, load_task


def _rows(split: str, size: int = 400, **options: int) -> list[dict]:
    return load_task("few_clue_sudoku", size=size, **options).rows(split)


def test_rows_are_puzzles_with_two_to_six_clues_and_one_of_their_answers() -> None:
    rows = _rows("train")
    assert {16 - row["puzzle"].count("0") for row in rows} == {2, 3, 4, 5, 6}
    for row in rows:
        assert row["prompt"] == f"[{row['puzzle']}]"
        assert grids.solves(row["solution"], row["puzzle"])


def test_most_puzzles_have_many_answers() -> None:
    rows = _rows("test")
    assert sum(len(grids.solutions(row["puzzle"])) > 1 for row in rows) > 0.75 * len(rows)


def test_splits_share_no_puzzle_whatever_the_seed() -> None:
    puzzles = {
        split: {row["puzzle"] for seed in range(3) for row in _rows(split, seed=seed)}
        for split in ("train", "validation", "test")
    }
    for first, second in itertools.combinations(puzzles, 2):
        assert not puzzles[first] & puzzles[second]
    # The published held-out part: checksum of the puzzle, modulo ten, is zero.
    assert all(
        (zlib.crc32(puzzle.encode()) % 10 == 0) == (split == "test") for split in puzzles for puzzle in puzzles[split]
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_puzzles_are_distinct(split: str) -> None:
    rows = _rows(split, size=700)
    assert len({row["puzzle"] for row in rows}) == 700


def test_all_288_grids_occur_in_training() -> None:
    assert {row["solution"] for row in _rows("train", size=5000)} == set(grids.all_grids())


def test_same_options_give_the_same_rows_and_another_seed_gives_others() -> None:
    assert _rows("test") == _rows("test")
    assert _rows("test") != _rows("test", seed=1)
    assert _rows("test", size=50) == _rows("test", size=100)[:50]


def test_check_accepts_every_answer_and_nothing_else() -> None:
    task = load_task("few_clue_sudoku")
    rng = random.Random(0)
    for row in _rows("test", size=20):
        answers = set(grids.solutions(row["puzzle"]))
        for grid in grids.all_grids():
            assert task.check(grid, row) == (grid in answers)
        for _ in range(20):
            text = "".join(rng.choice("1234") for _ in range(16))
            assert task.check(text, row) == (text in answers)


def test_check_reads_all_of_the_completion_but_white_space() -> None:
    task = load_task("few_clue_sudoku")
    (row,) = _rows("test", size=1)
    answer = row["solution"]
    assert task.check(f" {' '.join(answer)}\n", row) is True
    for wrong in ("", answer[:-1], answer + "1", f"answer: {answer}", row["puzzle"]):
        assert task.check(wrong, row) is False
    assert task.check(answer, {}) is None


def test_metrics() -> None:
    task = load_task("few_clue_sudoku")
    rows = _rows("test", size=4)
    completions = [rows[0]["solution"], "", rows[2]["solution"], "1"]
    assert task.metrics(completions, rows) == {"solved": 0.5}


def test_dataset_has_the_same_rows() -> None:
    assert load_task("few_clue_sudoku", size=5).dataset("validation").to_list() == _rows("validation", size=5)


def test_more_rows_than_there_are_is_an_error() -> None:
    task = load_task("few_clue_sudoku", size=5000, min_clues=1, max_clues=1)
    with pytest.raises(ValueError, match="hardly more test puzzles"):
        task.rows("test")
