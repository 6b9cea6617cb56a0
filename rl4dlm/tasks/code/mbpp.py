"""MBPP, short functions by description (arXiv 2108.07732), and EvalPlus's MBPP+ with more tests (arXiv 2305.01210).

Owns the readers, from the hub or a file in the published columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.columns import as_text
from rl4dlm.tasks.base import Row, check_size, check_style
from rl4dlm.tasks.code import prompts
from rl4dlm.tasks.code.base import CodeTask
from rl4dlm.tasks.code.sources import Test, asserts, entry_point_of, inputs_and_results, signature_of
from rl4dlm.tasks.files import Paths, files_by_split, read_hub, read_rows


@dataclass(frozen=True)
class MBPP(CodeTask):
    """Rows `prompt`, `problem`, `question` (the description), `solution` and `task_id`.

    A description does not name the function: the prompt shows the first test, or with style "d1" the signature.

    Args:
        style: of the prompt: "evalplus", "d1" or "complete"; see `rl4dlm.tasks.code.prompts`.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file for the test split, or a mapping from splits to files, in the columns
            of either configuration: `task_id`, `text` or `prompt`, `code`, `test_list`, and `test_setup_code` or
            `test_imports`. Splits without a file come from the hub.
        hub_id: dataset on the hub with the same columns.
        hub_config: its configuration: "full" has 500 test rows, "sanitized" 257.
    """

    name: ClassVar[str] = "mbpp"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    style: str = "evalplus"
    size: int | None = None
    path: Paths = None
    hub_id: str = "google-research-datasets/mbpp"
    hub_config: str | None = "full"

    def __post_init__(self) -> None:
        check_style(self.style, prompts.EVALUATION_STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)

    def _rows(self, split: str) -> list[Row]:
        file = files_by_split(self.path, self.splits).get(split)
        source = (
            read_rows(file, "task_id", "code", "test_list") if file else read_hub(self.hub_id, self.hub_config, split)
        )
        return [self._row(row) for row in source[: self.size]]

    def _row(self, row: dict[str, Any]) -> Row:
        listed = listed_texts(row["test_list"])
        entry_point = entry_point_of(listed)
        text = as_text(row.get("text")) or as_text(row.get("prompt")) or ""
        imports = row.get("test_setup_code") or "\n".join(listed_texts(row.get("test_imports") or []))
        problem = Problem(tests=tuple(self._tests(row, listed, entry_point)), entry_point=entry_point, setup=imports)
        signature = signature_of(row["code"], entry_point)
        return {
            "prompt": prompts.described(text, listed[0], style=self.style, signature=signature),
            "problem": problem.to_json(),
            "question": text,
            "solution": row["code"],
            "task_id": str(row["task_id"]),
        }

    def _tests(self, row: dict[str, Any], listed: list[str], entry_point: str | None) -> list[Test]:
        return asserts(listed)


@dataclass(frozen=True)
class MBPPPlus(MBPP):
    """MBPP with EvalPlus's tests, about 35 times as many. Options and rows are MBPP's; there is a test split alone.

    A file has the column `test` beside the others.
    """

    name: ClassVar[str] = "mbpp_plus"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    hub_id: str = "evalplus/mbppplus"
    hub_config: str | None = None

    def _tests(self, row: dict[str, Any], listed: list[str], entry_point: str | None) -> list[Test]:
        test = as_text(row.get("test"))
        if test is None or entry_point is None:
            raise ValueError(f"task {self.name!r}: row {row.get('task_id')!r} has no column 'test' that can be read")
        return inputs_and_results(test, entry_point)


def listed_texts(value: Any) -> list[str]:
    """A column of texts; CSV has them as one text of a Python or JSON list.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        import ast

        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{value!r:.60} is no list of texts") from None
    found = list(value)
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{found!r:.60} is no list of texts")
    return found
