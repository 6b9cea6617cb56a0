"""GSM8K, grade-school word problems with an integer answer (arXiv 2110.14168).

Owns the reader, from the hub or a file, and the checker. Prompts are those of the papers, in `prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_text
from rl4dlm.grading.text import hash_answer, last_boxed, last_number, parse_number, read_number
from rl4dlm.tasks import prompts
from rl4dlm.tasks.base import Row, Task, check_size, check_style
from rl4dlm.tasks.files import Paths, check_held_out, files_by_split, read_hub, read_rows, with_validation


@dataclass(frozen=True)
class GSM8K(Task):
    """Rows `prompt` (chat messages), `question`, `answer` (the text after `####`) and `solution` (the whole worked
    answer).

    Args:
        style: of the prompt: "d1", "spg" (the same), "espo" or "igpo"; see `rl4dlm.tasks.prompts`.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with columns `question` and `answer` for the test split, or a mapping
            from splits to files. Splits without a file come from the hub.
        validation_size: rows at the end of the training split that are the validation split instead, where `path` names
            no file for it. The papers train on all of them, with 0, and choose checkpoints on test data.
        hub_id: dataset on the hub with the same columns.
        hub_config: its configuration.
    """

    name: ClassVar[str] = "gsm8k"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    style: str = "d1"
    size: int | None = None
    path: Paths = None
    hub_id: str = "openai/gsm8k"
    hub_config: str | None = "main"
    validation_size: int = 0

    def __post_init__(self) -> None:
        check_style(self.style, prompts.MATH_STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)
        check_held_out(self.validation_size)

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)

        def read(split: str) -> list[Row]:
            if split in files:
                return read_rows(files[split], "question", "answer")
            return read_hub(self.hub_id, self.hub_config, split)

        source = with_validation(self.name, read, split, files, self.validation_size)
        rows = []
        for row in source[: self.size]:
            solution = as_text(row["answer"]) or ""
            answer = hash_answer(solution)
            rows.append(
                {
                    "prompt": prompts.gsm8k(row["question"], style=self.style, evaluation=split != "train"),
                    "question": row["question"],
                    "answer": solution.strip() if answer is None else answer,
                    "solution": solution,
                }
            )
        return rows

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer is numerically equal to the reference; `None` if the row has none.

        The answer is what `read_number` reads; of prose without `<answer>` and box the last number counts.
        """
        gold = gold_number(row.get("answer"))
        if gold is None:
            return None
        number = read_number(completion)
        if number is None and "<answer>" not in completion and last_boxed(completion) is None:
            number = last_number(completion)
        return number == gold


def gold_number(answer: Any) -> Fraction | None:
    """The reference number, from the number alone (text or not) or from a solution that ends in `#### number`."""
    text = as_text(answer)
    if text is None:
        return None
    stated = hash_answer(text)
    return parse_number(text if stated is None else stated)
