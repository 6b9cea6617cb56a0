"""Countdown: instances can be solved, splits do not leak, and the checker agrees with a search over all expressions."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest

from rl4dlm.tasks import load_task
from rl4dlm.tasks.countdown import judge

SPLITS = ("train", "validation", "test")


def _values(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value of every expression that uses each number once."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            rest = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            for a, b in itertools.product(_values(tuple(numbers[i] for i in chosen)), _values(rest)):
                values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return values


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: load_task("countdown", size=300).rows(split) for split in SPLITS}


def test_every_instance_comes_with_a_right_solution(rows: dict[str, list[dict]]) -> None:
    task = load_task("countdown")
    for row in (row for split in SPLITS for row in rows[split]):
        assert task.check(f"<answer>{row['solution']}</answer>", row) is True
        assert row["target"] in _values(tuple(map(Fraction, row["numbers"])))
        assert len(row["numbers"]) == 3 and 1 <= row["target"] <= 100 and all(1 <= n <= 100 for n in row["numbers"])


def test_no_instance_is_in_two_splits_in_any_order_of_its_numbers(rows: dict[str, list[dict]]) -> None:
    keys = [(*sorted(row["numbers"]), row["target"]) for split in SPLITS for row in rows[split]]
    assert len(set(keys)) == len(keys)
    other = [
        (*sorted(row["numbers"]), row["target"]) for row in load_task("countdown", size=3000, seed=1).rows("train")
    ]
    held_out = {(*sorted(row["numbers"]), row["target"]) for split in ("validation", "test") for row in rows[split]}
    assert not held_out & set(other)


def test_rows_follow_the_options() -> None:
    assert load_task("countdown", size=20).rows("test") == load_task("countdown", size=20).rows("test")
    assert load_task("countdown", size=20).rows("test") != load_task("countdown", size=20, seed=1).rows("test")
    (row,) = load_task("countdown", size=1, numbers=5, max_number=9, max_target=10).rows("train")
    assert len(row["numbers"]) == 5 and max(row["numbers"]) <= 9 and row["target"] <= 10


@pytest.mark.parametrize(
    ("answer", "numbers_right", "solved"),
    [
        ("3*4+5", True, True), (" (4 * 3)\n + 5 ", True, True), ("3*4+5 = 17", True, True),
        (r"\boxed{3 \times 4 + 5}", True, True),
        ("3×4+5", True, True), ("5-(-4)*3", True, True), ("3+4+5", True, False), ("3*4+5+5", False, False),
        ("17", False, False),
        ("34+5", False, False), ("", False, False), ("3*4+5=x", False, False), ("3**4+5", False, False),
        ("3*4+5 or so", False, False),
        ("__import__('os')", False, False), ("9**9**9", False, False),
    ],
)  # fmt: skip
def test_judge(answer: str, numbers_right: bool, solved: bool) -> None:
    assert judge(answer, [3, 4, 5], 17) == (numbers_right, solved)


def test_arithmetic_is_exact() -> None:
    assert judge("1/3*3*7", [1, 3, 3, 7], 7).solved
    assert not judge("10000000000000000000000001/10000000000000000000000000", [10**25 + 1, 10**25], 1).solved


def test_check_reads_the_answer_tag_or_a_box() -> None:
    task = load_task("countdown")
    row = {"numbers": [3, 4, 5], "target": 17}
    assert task.check("so <answer>\n3*4+5\n</answer>", row) is True
    assert task.check(r"so \boxed{3*4+5}", row) is True
    assert task.check(r"<reasoning>\boxed{1}</reasoning><answer>\boxed{3*4+5}</answer>", row) is True
    assert task.check("3*4+5", row) is False
    assert task.check("<answer>3*4+5</answer><answer>3</answer>", row) is False
    assert task.check("<answer>3*4+5</answer>", {"numbers": [3, 4, 5]}) is None


def test_files_in_both_forms(tmp_path: Path) -> None:
    paper, hub = tmp_path / "paper.jsonl", tmp_path / "hub.json"
    paper.write_text('{"input": "30,100,93", "output": "23"}\n\n{"input": "83,18,75", "output": "10"}\n')
    hub.write_text(json.dumps([{"nums": [30, 100, 93], "target": 23}]))
    task = load_task("countdown", path={"test": paper, "train": hub})
    assert [(row["numbers"], row["target"]) for row in task.rows("test")] == [([30, 100, 93], 23), ([83, 18, 75], 10)]
    assert [(row["numbers"], row["target"]) for row in task.rows("train")] == [([30, 100, 93], 23)]


def test_instances_of_a_file_are_left_out_of_generated_splits(tmp_path: Path) -> None:
    generated = load_task("countdown", size=40).rows("train")
    path = tmp_path / "test.jsonl"
    path.write_text(
        "".join(json.dumps({"nums": row["numbers"][::-1], "target": row["target"]}) + "\n" for row in generated)
    )
    others = load_task("countdown", size=40, path=path).rows("train")
    assert not {(*sorted(r["numbers"]), r["target"]) for r in others} & {
        (*sorted(r["numbers"]), r["target"]) for r in generated
    }


@pytest.mark.parametrize(
    "line", ['{"input": "1,x", "output": "3"}', '{"input": "1,2"}', '{"nums": 3, "target": 3}', '{"a": 1}']
)
def test_wrong_row_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input": "1,2", "output": "3"}\n' + line)
    with pytest.raises(ValueError, match=r"bad\.jsonl: row 2"):
        load_task("countdown", path=path).rows("test")


def test_papers_file(shared_dir: Path) -> None:
    path = shared_dir / "data" / "countdown_cd3_test_d1.jsonl"
    if not path.is_file():
        pytest.skip("the paper's file is absent")
    rows = load_task("countdown", path=path).rows("test")
    assert len(rows) == 256
    assert (rows[0]["numbers"], rows[0]["target"]) == ([30, 100, 93], 23)
    assert all(row["target"] in _values(tuple(map(Fraction, row["numbers"]))) for row in rows)
