"""AIME, fifteen problems a paper whose answers are whole numbers from 0 to 999.

Owns the reader of one year, from the hub or a file, and the checker. Prompts are those of MATH in the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_integer
from rl4dlm.grading.text import read_number
from rl4dlm.tasks import prompts
from rl4dlm.tasks.base import Row, Task, check_size, check_style
from rl4dlm.tasks.files import Paths, files_by_split, read_hub, read_rows

HUB_IDS = {2024: "HuggingFaceH4/aime_2024", 2025: "yentinglin/aime_2025"}


@dataclass(frozen=True)
class AIME(Task):
    """Rows `prompt` (chat messages), `problem` and `answer` (a whole number). There is a test split alone.

    Args:
        year: 2024 or 2025, each 30 problems.
        style: of the prompt: "d1", "spg" (the same), "espo" or "igpo"; see `rl4dlm.tasks.prompts`.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with columns `problem` and `answer`. Without one the hub's.
        hub_id: dataset on the hub with the same columns; None: the year's.
    """

    name: ClassVar[str] = "aime"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    year: int = 2025
    style: str = "d1"
    size: int | None = None
    path: Paths = None
    hub_id: str | None = None

    def __post_init__(self) -> None:
        if self.year not in HUB_IDS:
            raise ValueError(f"year={self.year!r}; the years are {', '.join(map(str, HUB_IDS))}")
        check_style(self.style, prompts.MATH_STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)
        if split in files:
            source = read_rows(files[split], "problem", "answer")
        else:
            source = read_hub(self.hub_id or HUB_IDS[self.year], "default", "train")
        rows = []
        for row in source[: self.size]:
            prompt = prompts.math(row["problem"], style=self.style, evaluation=True)
            rows.append({"prompt": prompt, "problem": row["problem"], "answer": as_integer(row["answer"])})
        return rows

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the last answer is the number; `None` if the row has none. Read as GSM8K's answers are."""
        gold = as_integer(row.get("answer"))
        return None if gold is None else read_number(completion) == gold
