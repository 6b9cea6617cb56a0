"""What every task offers: rows for a split, an exact checker, metrics.

Owns that contract and the settings that tasks share. Rows are plain dicts; `datasets` is imported only when a dataset
is made.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

# Draws in a row that a generator may reject before it says that a split has too few instances.
MOST_MISSES = 50_000

T = TypeVar("T")


class Task(ABC):
    """A source of prompts and the judge of what comes back.

    The column `prompt` is a string, or a list of chat messages. Where it ends with an assistant message, the model
    continues that message (`rl4dlm.tasks.prompts.encode_prompt` renders it so, everywhere).

    A task of one's own defines `_rows` and `check`, and `splits` where it has others; `name` is what results call it.
    Its options are the fields of the class, where that is a dataclass. `rl4dlm.tasks` says how to name it.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A task that says no `name` is called by its class, in small letters."""
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__.lower()

    @property
    def protocol(self) -> str:
        """What a number of this task is a number of, where there are several ways to ask: for results. Else ""."""
        return ""

    def dataset(self, split: str) -> Dataset:
        """`rows` as a dataset."""
        from datasets import Dataset

        return Dataset.from_list(self.rows(split))

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, always the same for the same options.

        Raises:
            ValueError: the task has no such split, or a file that cannot be read.
        """
        if split not in self.splits:
            raise ValueError(f"task {self.name!r} has no split {split!r}; its splits: {', '.join(self.splits)}")
        return self._rows(split)

    @abstractmethod
    def _rows(self, split: str) -> list[Row]:
        """The rows of one of `splits`, all with the same keys."""

    @abstractmethod
    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether a completion solves a row, exactly; `None` where the row says too little to tell."""

    def require(self) -> None:
        """Raises if this machine cannot tell whether a completion solves a row, before any is made."""
        return None

    def check_many(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """`check` for each pair."""
        return [self.check(completion, row) for completion, row in zip(completions, rows, strict=True)]

    def metrics(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """`solved`, the share of checked completions that solve their row, and what else the task's papers report.

        A metric over no completions is `nan`.
        """
        verdicts = [verdict for verdict in self.check_many(completions, rows) if verdict is not None]
        return {"solved": share(sum(verdicts), len(verdicts))}

    def measured(
        self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[bool | None], dict[str, float]]:
        """`check_many` and `metrics`; a task whose checks are costly makes both of one pass."""
        return self.check_many(completions, rows), self.metrics(completions, rows)


def share(part: float, whole: float) -> float:
    """`part / whole`, and `nan` of nothing."""
    return part / whole if whole else float("nan")


def tenth(key: str) -> int:
    """Which of ten parts an instance belongs to, 0 to 9: a property of the instance, not of a seed or an order."""
    return zlib.crc32(key.encode()) % 10


def split_of(key: str) -> str:
    """The split of an instance: of ten parts the first is for testing, the second for validation."""
    return {0: "test", 1: "validation"}.get(tenth(key), "train")


def gather(draw: Callable[[], T | None], size: int, what: str) -> list[T]:
    """`size` instances from a generator that answers `None` where what it drew may not be used.

    Raises:
        ValueError: it hardly finds any more; the message says of `what`.
    """
    found: list[T] = []
    misses = 0
    while len(found) < size:
        instance = draw()
        if instance is not None:
            misses = 0
            found.append(instance)
            continue
        misses += 1
        if misses > MOST_MISSES:
            raise ValueError(f"size={size}; after {len(found)} rows there are hardly more {what}")
    return found


def check_size(size: int | None) -> None:
    """Refuse a `size` that is not a positive number of rows or `None`."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size={size!r}; give a positive number of rows, or None for the task's own")


def check_style(style: str, allowed: Sequence[str]) -> None:
    """Refuse a `style` of prompt that does not exist."""
    if style not in allowed:
        raise ValueError(f"style={style!r}; the prompt styles are {', '.join(allowed)}")
