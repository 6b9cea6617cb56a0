"""KodCode-Light-RL-10K, synthetic problems with tests for pytest (arXiv 2503.02951); the d1 line's code tasks use it.

Owns the reader, from the hub or a file in the published columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.code.problem import Problem
from rl4dlm.tasks.base import Row
from rl4dlm.tasks.code import prompts
from rl4dlm.tasks.code.sources import pytest_functions
from rl4dlm.tasks.code.training_sets import TrainingSet


@dataclass(frozen=True)
class KodCode(TrainingSet):
    """Rows `prompt`, `problem`, `question`, `solution` and `task_id`.

    A file has the columns `question`, `solution` and `test`, and may have `test_info` (a list of functions with
    `function_name` and `parameter_list`) and `question_id`. Assertions are tests of their own, and a row none of whose
    tests can be run without pytest is left out. Options are those of `TrainingSet`.
    """

    name: ClassVar[str] = "kodcode"
    columns: ClassVar[tuple[str, ...]] = ("question", "solution", "test")

    hub_id: str = "KodCode/KodCode-Light-RL-10K"

    def _made(self, row: dict[str, Any]) -> list[Row]:
        tests = pytest_functions(row["test"])
        if not tests:
            return []
        functions = row.get("test_info") or [{}]
        first = functions[0] if isinstance(functions, list) and isinstance(functions[0], dict) else {}
        name = first.get("function_name")
        signature = f"{name}{first.get('parameter_list') or '()'}" if name else ""
        shown = next((test["source"] for test in tests if test["source"].startswith("assert ")), "")
        prompt = prompts.training(row["question"], style=self.style, test=shown, signature=signature)
        return [
            {
                "prompt": prompt,
                "problem": Problem(tuple(tests), entry_point=name).to_json(),
                "question": row["question"],
                "solution": row["solution"],
                "task_id": str(row.get("question_id") or ""),
            }
        ]
