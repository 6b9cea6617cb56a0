"""Tasks of code judge by running: right programs solve their rows, half-right ones pass a share of tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl4dlm import load_task
from rl4dlm.tasks.code import base
from tests.tasks.code.test_readers import HUMANEVAL, METHOD, livecodebench_row, written


def test_worked_programs_solve_their_rows_and_others_pass_a_share() -> None:
    task = load_task("code_mini", size=24, min_level=2)
    rows = task.rows("test")
    right = [row["solution"] for row in rows]
    half = [f"{program[: program.rindex('return')]}return None" for program in right]
    texts = [*right, *half, "def f(", *(f"Here:\n```python\n{program}\n```" for program in right[:3])]
    asked = [*rows, *rows, rows[0], *rows[:3]]
    verdicts, metrics = task.measured(texts, asked)
    assert verdicts == [True] * 24 + [False] * 25 + [True] * 3
    assert metrics["solved"] == pytest.approx(27 / 52) and metrics["tests_passed"] >= 27 / 52
    assert task.check("def f(n):\n    return n", {"prompt": "?"}) is None
    given = json.loads(rows[0]["problem"])["tests"]
    table = {test["call"][2:-1]: test["expected"] for test in given[:3]}
    partial = "def f(x):\n    return {" + ", ".join(f"{key!r}: {value}" for key, value in table.items()) + "}[repr(x)]"
    assert task.passed([partial], rows[:1]) == [0.5]


def test_published_forms_are_judged(tmp_path: Path) -> None:
    human = load_task("humaneval", path=written(tmp_path / "h.jsonl", [HUMANEVAL]))
    (row,) = human.rows("test")
    body = "    return math.pi * r * r\n"
    for text, solved in (
        (f"{HUMANEVAL['prompt'].split('import math')[1]}{body}```", True),  # the prompt has opened the fence
        (body, True),  # goes on from the prompt
        ("def area(r):\n    return 3.14 * r * r\n```", True),
        ("def area(r):\n    return 0\n```", False),
        ("I do not know.", False),
    ):
        assert human.check(text, row) is solved, text
    contest = load_task(
        "livecodebench",
        path=written(
            tmp_path / "c.jsonl", [livecodebench_row(1, "2024-01-01"), livecodebench_row(2, "2024-01-01", **METHOD)]
        ),
    )
    method = "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + sum(b)"
    texts = ["```python\nprint(int(input()) + 1)\n```", f"```python\n{method}\n```"]
    assert contest.check_many(texts, contest.rows("test")) == [True, True]
    assert contest.check_many(texts[::-1], contest.rows("test")) == [False, False]


def test_evaluation_runs_programs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(base, "judge", lambda completions, problems: calls.append(1) or [None] * len(completions))
    load_task("code_mini", size=2).measured(["a", "b"], [{}, {}])
    assert calls == [1]
