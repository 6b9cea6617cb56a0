"""HumanEval, 164 functions to complete (arXiv 2107.03374), and EvalPlus's HumanEval+ with more tests (2305.01210).

Owns the readers, from the hub or a file in the published columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.code.problem import Problem
from rl4dlm.tasks.base import Row, check_size, check_style
from rl4dlm.tasks.code import prompts
from rl4dlm.tasks.code.base import CodeTask
from rl4dlm.tasks.code.sources import before_function, check_function, docstring_of
from rl4dlm.tasks.files import Paths, files_by_split, read_hub, read_rows

_COLUMNS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True)
class HumanEval(CodeTask):
    """Rows `prompt`, `problem`, `question` (the docstring), `solution` and `task_id`.

    Args:
        style: of the prompt: "evalplus", "d1" or "complete"; see `rl4dlm.tasks.code.prompts`.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with the columns `task_id`, `prompt`, `entry_point`, `test` and
            `canonical_solution`, or a mapping from the split `test` to it. Without one, the hub.
        hub_id: dataset on the hub with the same columns.
    """

    name: ClassVar[str] = "humaneval"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    style: str = "evalplus"
    size: int | None = None
    path: Paths = None
    hub_id: str = "openai/openai_humaneval"

    def __post_init__(self) -> None:
        check_style(self.style, prompts.EVALUATION_STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)

    def _rows(self, split: str) -> list[Row]:
        file = files_by_split(self.path, self.splits).get(split)
        source = read_rows(file, *_COLUMNS) if file else read_hub(self.hub_id, None, split)
        return [self._row(row) for row in source[: self.size]]

    def _row(self, row: dict[str, Any]) -> Row:
        beginning, entry_point = row["prompt"], row["entry_point"]
        problem = Problem(
            tests=tuple(check_function(row["test"], entry_point)),
            entry_point=entry_point,
            setup=before_function(beginning, entry_point),
            prefix=beginning,
        )
        return {
            "prompt": prompts.function(beginning, style=self.style),
            "problem": problem.to_json(),
            "question": docstring_of(beginning, entry_point),
            "solution": beginning + (row.get("canonical_solution") or ""),
            "task_id": str(row["task_id"]),
        }


@dataclass(frozen=True)
class HumanEvalPlus(HumanEval):
    """HumanEval with EvalPlus's tests, about 80 times as many. Options and rows are HumanEval's.

    Results that are floating-point numbers are compared as `rl4dlm.grading.code.verdicts` does.
    """

    name: ClassVar[str] = "humaneval_plus"

    hub_id: str = "evalplus/humanevalplus"
