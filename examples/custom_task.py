"""A task of your own: rows for each split, and an exact checker. Everything that takes a task's name takes this file.

    rl4dlm train diffu_grpo --task examples/custom_task.py --reward_funcs examples/custom_task.py:solved ...
    rl4dlm eval --task examples/custom_task.py ...

`docs/own-task.md` has the whole commands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from rl4dlm.grading.columns import as_integers
from rl4dlm.tasks.base import Row, Task, split_of


@dataclass(frozen=True)
class Extremes(Task):
    """Rows `prompt` ("3140:") and `digits`; the smallest and the largest digit ("04") solve one.

    Args:
        count: how many digits there are.
        largest: of the digits, which may occur several times.
    """

    count: int = 4
    largest: int = 4

    def __post_init__(self) -> None:
        if not (self.count >= 2 and 1 <= self.largest <= 9):
            raise ValueError(f"count={self.count}, largest={self.largest}; at least 2 digits, up to 1 to 9")

    def _rows(self, split: str) -> list[Row]:
        instances = [list(digits) for digits in product(range(self.largest + 1), repeat=self.count)]
        # The same digits in another order are the same instance, so that no answer is in two splits.
        mine = [digits for digits in instances if split_of(str(sorted(digits))) == split]
        return [{"prompt": "".join(map(str, digits)) + ":", "digits": digits} for digits in mine]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the first run of digits is the answer; `None` where the row has no digits."""
        digits = as_integers(row.get("digits"))
        found = re.search(r"\d+", completion)
        return None if digits is None else bool(found) and found[0] == f"{min(digits)}{max(digits)}"


def solved(completions: list[str], digits: list[Any], **columns: Any) -> list[float | None]:
    """A reward: 1 for what solves the task, 0.5 for one of the two digits in its place."""
    task, rewards = Extremes(), []
    for text, given in zip(completions, digits, strict=True):
        one = text[:1] == str(min(given)) or text[1:2] == str(max(given))
        rewards.append(1.0 if task.check(text, {"digits": given}) else one / 2)
    return rewards
