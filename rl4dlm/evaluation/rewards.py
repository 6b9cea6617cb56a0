"""Completions measured by reward functions, for data that no task's checker knows.

Owns how reward functions are called outside of training, as a trainer calls them (`docs/rewards.md`): prompts,
completions, the columns of the dataset and how each completion was decoded. And the mean of what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rl4dlm.rollout.rollout import Rollout
from rl4dlm.tasks.base import Row, Task
from rl4dlm.tasks.files import FORMATS, read_rows
from rl4dlm.training.rollout_columns import with_rollout

RESERVED = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class DatasetTask(Task):
    """The rows of a file as a task without a checker: what is right, reward functions say.

    Args:
        path: a .csv, .json, .jsonl or .parquet file with a column `prompt`.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it cannot be read.
    """

    path: str

    splits = ("test",)

    def __post_init__(self) -> None:
        if Path(self.path).suffix not in FORMATS:
            raise ValueError(f"dataset={self.path!r}; files that can be read end in {', '.join(FORMATS)}")
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"dataset={self.path!r}: there is no such file")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The file's name, without its folder."""
        return Path(self.path).name

    def _rows(self, split: str) -> list[Row]:
        return read_rows(Path(self.path), "prompt")

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """None: a file has no checker."""
        return None


@dataclass(frozen=True)
class Rewards:
    """Reward functions, and when their sum counts as solved.

    Args:
        functions: name to function, in TRL's signature.
        weights: of each, for the sum; None: 1.
        threshold: a completion whose sum is at least this counts as solved, in place of what the task's checker says.
            None: the checker decides.

    Raises:
        ValueError: no functions, or as many weights as there are not functions.
    """

    functions: Mapping[str, Callable[..., Any]]
    weights: Sequence[float] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("functions is empty; name at least one reward function")
        if self.weights is not None and len(self.weights) != len(self.functions):
            raise ValueError(f"weights={list(self.weights)!r}: there are {len(self.functions)} reward functions")
        if self.threshold is not None and not isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold} is not allowed; it must be a finite number")

    def values(
        self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], rollout: Rollout
    ) -> dict[str, list[float | None]]:
        """What each function says of each completion, and their weighted sum as `"reward"`; None: it cannot tell.

        Args:
            texts: one per row of the rollout. rows: of the dataset, one for each of them.

        Raises:
            ValueError: a function that returns another number of rewards, or one that is no finite number.
        """
        prompts, completions = [], []
        for text, row in zip(texts, rows, strict=True):
            chat = not isinstance(row["prompt"], str)
            prompts.append([dict(message) for message in row["prompt"]] if chat else row["prompt"])
            completions.append([{"role": "assistant", "content": text}] if chat else text)
        told = with_rollout(rows, rollout)
        columns = {name: [row[name] for row in told] for name in told[0] if name not in RESERVED}
        found: dict[str, list[float | None]] = {}
        for name, function in self.functions.items():
            given = function(prompts=prompts, completions=completions, completion_ids=rollout.completion_ids, **columns)
            values = [None if value is None or value != value else float(value) for value in given]
            if len(values) != len(texts) or any(value is not None and not isfinite(value) for value in values):
                raise ValueError(
                    f"the reward function {name!r} returned {len(values)} rewards for {len(texts)} completions, or one "
                    "that is not finite"
                )
            found[name] = values
        weights = self.weights or [1.0] * len(found)
        sums: list[float | None] = []
        for each in zip(*found.values(), strict=True):
            told_of = [weight * value for weight, value in zip(weights, each, strict=True) if value is not None]
            sums.append(sum(told_of) if told_of else None)
        return {**found, "reward": sums}

    def verdicts(self, sums: Sequence[float | None]) -> list[bool | None]:
        """Whether each sum reaches the threshold."""
        assert self.threshold is not None
        return [None if value is None else value >= self.threshold for value in sums]


def summary(values: Mapping[str, Sequence[float | None]], samples: int) -> dict[str, float]:
    """Mean and standard error of each reward, NaN where there is none; prompts are the trials, and not samples.

    Args:
        values: name to one per completion, `samples` of each prompt after another.
    """
    found: dict[str, float] = {}
    for name, rewards in values.items():
        groups = [rewards[start : start + samples] for start in range(0, len(rewards), samples)]
        means = [mean(known) for group in groups if (known := [value for value in group if value is not None])]
        key = name if name == "reward" else f"reward/{name}"
        found[key] = mean(means) if means else float("nan")
        found[f"{key}/standard_error"] = stdev(means) / sqrt(len(means)) if len(means) > 1 else float("nan")
    return found
