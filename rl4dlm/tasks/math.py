"""MATH, competition problems with LaTeX answers (arXiv 2103.03874), and its test subset MATH-500.

Owns the reader, from the hub or a file, and the checker, which compares answers as mathematics. Prompts are those of
the papers, in `prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_text
from rl4dlm.grading.latex import equivalent
from rl4dlm.grading.text import answer_or_text, last_answer_block, last_boxed
from rl4dlm.tasks import prompts
from rl4dlm.tasks.base import Row, Task, check_size, check_style
from rl4dlm.tasks.files import Paths, check_held_out, files_by_split, read_hub, read_rows, with_validation


@dataclass(frozen=True)
class Math(Task):
    """Rows `prompt` (chat messages), `problem`, `answer` (LaTeX, unboxed) and `solution` (the whole worked answer).

    Args:
        style: of the prompt: "d1", "spg" (the same), "espo" or "igpo"; see `rl4dlm.tasks.prompts`.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with columns `problem` and `solution` for the test split, or a mapping
            from splits to files. A column `answer` comes before the last box of the solution. Splits without a file
            come from the hub.
        validation_size: rows at the end of the training split that are the validation split instead, where `path` names
            no file for it. The papers train on all of them, with 0, and choose checkpoints on test data.
        hub_id: dataset on the hub for training, all its configurations; d1 trained on "ankner/math-500".
        test_hub_id: dataset on the hub for test.
        deadline: seconds that comparing one answer may take; one that takes longer is wrong.
    """

    name: ClassVar[str] = "math"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    style: str = "d1"
    size: int | None = None
    path: Paths = None
    hub_id: str = "EleutherAI/hendrycks_math"
    test_hub_id: str = "HuggingFaceH4/MATH-500"
    deadline: float = 5.0
    validation_size: int = 0

    def __post_init__(self) -> None:
        check_style(self.style, prompts.MATH_STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)
        check_held_out(self.validation_size)
        if not 0 < self.deadline < float("inf"):
            raise ValueError(f"deadline={self.deadline} seconds; it must be positive and finite")

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)

        def read(split: str) -> list[Row]:
            if split in files:
                return read_rows(files[split], "problem", "solution")
            return read_hub(self.test_hub_id if split == "test" else self.hub_id, None, split)

        source = with_validation(self.name, read, split, files, self.validation_size)
        return [
            {
                "prompt": prompts.math(row["problem"], style=self.style, evaluation=split != "train"),
                "problem": row["problem"],
                "answer": as_text(row.get("answer")) or last_boxed(row["solution"]),
                "solution": row["solution"],
            }
            for row in source[: self.size]
        ]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer equals the reference as mathematics; `None` if the row has none. See `read_answer`."""
        return self.check_many([completion], [row])[0]

    def check_many(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """`check` for each pair, several at a time."""
        pairs = [
            (gold_answer(row["answer"]), read_answer(completion))
            for completion, row in zip(completions, rows, strict=True)
            if as_text(row.get("answer")) is not None
        ]
        verdicts = iter(equivalent(pairs, deadline=self.deadline))
        return [None if as_text(row.get("answer")) is None else next(verdicts) for row in rows]


def read_answer(completion: str) -> str:
    r"""The final answer: what the last `<answer>` holds, or the last box in it; without one, the last `\boxed{}` with
    something in it; without that, all of the completion."""
    block = last_answer_block(completion)
    if block is not None and block.strip():
        boxed = last_boxed(block)
        return block if boxed is None else boxed
    boxed = last_boxed(completion)
    return answer_or_text(completion) if boxed is None else boxed


def gold_answer(answer: Any) -> str:
    """The reference answer, from the answer alone (text or a number) or from a solution that boxes it."""
    text = as_text(answer) or ""
    boxed = last_boxed(text)
    return text if boxed is None else boxed
