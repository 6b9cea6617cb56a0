"""What the readers of sets to train on have in common: their options, and that evaluation sets are kept out.

Owns both. The columns are each reader's business.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.tasks.base import Row, check_size, check_style
from rl4dlm.tasks.code import prompts
from rl4dlm.tasks.code.base import CodeTask
from rl4dlm.tasks.code.contamination import OVERLAP, Held, check_named, text_of, texts_of
from rl4dlm.tasks.code.humaneval import HumanEval
from rl4dlm.tasks.code.mbpp import MBPP
from rl4dlm.tasks.files import Paths, check_held_out, files_by_split, read_hub, read_rows, with_validation

logger = logging.getLogger(__name__)

EVALUATION_SETS = {HumanEval.name: HumanEval, MBPP.name: MBPP}
"""Those that can be named; with their tests or EvalPlus's the problems are the same."""


@dataclass(frozen=True)
class TrainingSet(CodeTask):
    """A set with a training split, of which rows that are in evaluation sets are left out.

    Args:
        style: of the prompt: "diffucoder", "espo" or "d1"; see `rl4dlm.tasks.code.prompts`.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file for each split, as a mapping. Splits without a file come from the hub.
        validation_size: rows at the end of the training split that are the validation split instead, where `path` names
            no file for it.
        evaluation_sets: problems that must not be trained on: "humaneval" and "mbpp" for those on the hub, or files in
            the columns of HumanEval, MBPP or LiveCodeBench. None: those two where the training rows come from the hub;
            where they come from a file, sets must be named, or none of them with [].
        overlap: words of a run that a row must not share with one of these problems.
        hub_id: dataset on the hub.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    columns: ClassVar[tuple[str, ...]]

    style: str = "d1"
    size: int | None = None
    path: Paths = None
    validation_size: int = 0
    evaluation_sets: Sequence[str] | None = None
    overlap: int = OVERLAP
    hub_id: str = ""

    def __post_init__(self) -> None:
        check_style(self.style, prompts.TRAINING_STYLES)
        check_size(self.size)
        check_held_out(self.validation_size)
        files = files_by_split(self.path, self.splits)
        check_named(self.evaluation_sets, list(EVALUATION_SETS))
        if files and self.evaluation_sets is None:
            raise ValueError(
                f"task {self.name!r} reads a file: set evaluation_sets to what it must not share problems with, names "
                f"of tasks ({', '.join(EVALUATION_SETS)}) or files, or to [] for nothing"
            )
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or self.overlap < 3:
            raise ValueError(f"overlap={self.overlap!r}; a run has at least 3 words")

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)

        def read(split: str) -> list[dict[str, Any]]:
            rows = read_rows(files[split], *self.columns) if split in files else read_hub(self.hub_id, None, split)
            return self._chosen(rows)

        source = with_validation(self.name, read, split, files, self.validation_size)
        held = Held(self._held_texts(), self.overlap)
        kept = [row for row in source if not held.has(str(row["question"]))]
        if len(kept) < len(source):
            logger.info("%s: %d of %d rows are in evaluation sets", self.name, len(source) - len(kept), len(source))
        made: list[Row] = []
        for row in kept:
            made += self._made(row)
            if self.size is not None and len(made) >= self.size:
                break
        if not made:
            raise ValueError(f"task {self.name!r}: split {split!r} has no row whose tests can be run")
        return made[: self.size]

    def _held_texts(self) -> list[str]:
        texts: list[str] = []
        for name in EVALUATION_SETS if self.evaluation_sets is None else self.evaluation_sets:
            if name in EVALUATION_SETS:
                task = EVALUATION_SETS[name]()
                texts += [text_of({"text": row["question"]}, name) for split in task.splits for row in task.rows(split)]
            else:
                texts += texts_of(name)
        return texts

    def _chosen(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the set that are used; all of them."""
        return rows

    @abstractmethod
    def _made(self, row: dict[str, Any]) -> list[Row]:
        """What becomes of a row of the set: none, one or several."""
