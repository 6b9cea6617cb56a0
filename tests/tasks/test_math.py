"""MATH: rows of a local file and checks by mathematics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl4dlm.tasks import load_task
from rl4dlm.tasks.math import read_answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [
        {"problem": "Half of one?", "solution": r"It is \boxed{\frac{1}{2}}."},
        {"problem": "1+1?", "solution": "Two.", "answer": "2"},
        {"problem": "?", "solution": "Nothing."},
    ]
    path = tmp_path / "math.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows(path: Path) -> None:
    rows = load_task("math", path=path).rows("test")
    assert [row["answer"] for row in rows] == [r"\frac{1}{2}", "2", None]
    assert rows[1]["prompt"][-1] == {"role": "assistant", "content": "<reasoning>"}


def test_check_many_compares_as_mathematics_and_skips_rows_without_answer(path: Path) -> None:
    task = load_task("math", path=path, deadline=60)
    rows = task.rows("test")
    assert task.check_many([r"<answer>\boxed{0.5}</answer>", r"\boxed{3-1}", "7"], rows) == [True, True, None]
    assert task.check_many([r"\boxed{5}", "<answer>2.0</answer>", ""], rows) == [False, True, None]
    assert task.metrics([r"\boxed{0.5}", "", ""], rows) == {"solved": 0.5}


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"<answer>\boxed{5}</answer>", "5"),
        ("<answer> 5 </answer>", "5"),
        ("5", "5"),
        (r"\boxed{4} <answer>5</answer>", "5"),
    ],
)
def test_read_answer(completion: str, answer: str) -> None:
    assert read_answer(completion) == answer


def test_hub_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub(*arguments: str) -> list[dict]:
        asked.append(arguments)
        return [{"problem": "q", "solution": r"\boxed{1}"}]

    monkeypatch.setattr("rl4dlm.tasks.math.read_hub", read_hub)
    load_task("math").rows("test")
    load_task("math", hub_id="ankner/math-500").rows("train")
    assert asked == [("HuggingFaceH4/MATH-500", None, "test"), ("ankner/math-500", None, "train")]
