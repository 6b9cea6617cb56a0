"""Small Countdown: worked answers are right, the checker is Countdown's, splits do not leak."""

from __future__ import annotations

import itertools

import pytest

from rl4dlm.grading.expression import evaluate
from rl4dlm.tasks import load_task
from rl4dlm.tasks.countdown_small import tries_right

SPLITS = ("train", "validation", "test")


def _rows(split: str, size: int = 256, **options: int | str) -> list[dict]:
    return load_task("countdown_small", size=size, **options).rows(split)


def _key(row: dict) -> tuple[int, ...]:
    return (*sorted(row["numbers"]), row["target"])


@pytest.mark.parametrize("split", SPLITS)
def test_solutions_try_reach_the_target_and_box_the_expression(split: str) -> None:
    task = load_task("countdown_small")
    tries = set()
    for row in _rows(split):
        assert row["prompt"] == f"{','.join(map(str, row['numbers']))}={row['target']}\n"
        assert len(row["numbers"]) == 3 and all(1 <= n <= 20 for n in row["numbers"]) and 1 <= row["target"] <= 99
        *missed, reached, box = row["solution"].split("\n")
        assert reached == f"{row['answer']}={row['target']}" and box == f"\\boxed{{{row['answer']}}}"
        for line in (*missed, reached):
            left, _, right = line.partition("=")
            value, literals = evaluate(left)
            assert str(value) == right and sorted(literals) == sorted(row["numbers"])
            assert (value == row["target"]) == (line == reached)
        assert len(set(missed)) == len(missed)
        tries.add(len(missed))
        assert task.check(row["solution"], row) is True and tries_right(row["solution"], row["numbers"]) == 1.0
    assert tries == {0, 1, 2}


def test_a_changed_answer_is_not_accepted_and_countdown_agrees() -> None:
    task, countdown = load_task("countdown_small"), load_task("countdown")
    for row in _rows("test"):
        work, answer = row["solution"].rsplit("\n", 1)[0], row["answer"]
        boxed = [f"{answer}+1", f"{answer}*1", f"({answer}", str(row["target"]), answer.replace("+", "-", 1) + "-0", ""]
        for text in [work, f"{work}\n\\boxed{{{answer}", "", *(f"{work}\n\\boxed{{{wrong}}}" for wrong in boxed)]:
            assert task.check(text, row) is countdown.check(text, row) is False
        stated = f"\\boxed{{{answer}={row['target']}}}"
        for text in (row["solution"], f"{row['solution']} 7", stated, f"<answer>{answer}"):
            assert task.check(text, row) is countdown.check(text, row) is True
    assert task.check(r"\boxed{1}", {"numbers": [1]}) is None


def test_splits_share_no_instance_with_each_other_or_with_those_of_countdown() -> None:
    keys = {split: {_key(row) for seed in range(3) for row in _rows(split, seed=seed)} for split in SPLITS}
    countdown = load_task("countdown", size=500, max_number=20)
    large = {split: {_key(row) for row in countdown.rows(split)} for split in SPLITS}
    for first, second in itertools.permutations(SPLITS, 2):
        assert not keys[first] & (keys[second] | large[second])
    for split in ("validation", "test"):
        assert len({_key(row) for row in _rows(split)}) == 256


def test_the_numbers_do_not_stand_in_the_order_of_the_answer() -> None:
    rows = [row for row in _rows("train", size=1000) if len(set(row["numbers"])) == 3]
    in_order = sum(list(evaluate(row["answer"]).literals) == row["numbers"] for row in rows)
    assert 0.1 < in_order / len(rows) < 0.25  # one order of six


@pytest.mark.parametrize(
    ("options", "prompt", "solution"),
    [
        ({}, 12, 63),
        ({"max_number": 99}, 12, 63),
        ({"max_number": 9}, 9, 51),
        ({"max_number": 9, "max_tries": 0}, 9, 27),
    ],
)
def test_texts_fit_the_canvases_they_are_made_for(options: dict[str, int], prompt: int, solution: int) -> None:
    rows = _rows("train", size=3000, **options)
    assert max(len(row["prompt"]) for row in rows) <= prompt
    assert max(len(row["solution"]) + 1 for row in rows) <= solution
    assert len({len(row["solution"]) for row in rows}) > 3  # where to end has to be decided


def test_difficulty_is_set() -> None:
    rows = _rows("train", size=300, max_number=5, max_target=30, max_tries=4, symbols="+*")
    assert {row["solution"].count("\n") for row in rows} == {1, 2, 3, 4, 5}
    assert max(max(row["numbers"]) for row in rows) == 5 and max(row["target"] for row in rows) <= 30
    assert not set("-/") & set("".join(row["solution"].rsplit("\n", 1)[0] for row in rows))


def test_same_options_give_the_same_rows_and_another_seed_gives_others() -> None:
    assert _rows("test", 50) == _rows("test", 50) == _rows("test", 100)[:50]
    assert _rows("test", 50) != _rows("test", 50, seed=1)


def test_an_instance_returns_in_training_with_another_order_or_another_answer() -> None:
    found: dict[tuple[int, ...], set[str]] = {}
    for row in _rows("train", size=3000, max_number=5):
        found.setdefault(_key(row), set()).add(row["prompt"] + row["answer"])
    assert sum(len(ways) > 1 for ways in found.values()) > len(found) / 2


def test_tries_count_in_any_order() -> None:
    for lines in itertools.permutations(["4*3+7=19", "4+3+7=14", "4*7-3=25", "4*7-3=26"]):
        assert tries_right("\n".join(lines), "4,7,3") == 0.75


def test_more_rows_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="hardly more test instances of numbers up to 3 with a target up to 99"):
        _rows("test", max_number=3)
