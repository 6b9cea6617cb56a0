"""Rewards for small Countdown: 1 for the target and 0 for anything else, or the share of lines that are honest tries.

`tries` pays for right arithmetic with the given numbers, whatever it reaches; give it the smaller weight beside
`countdown_small`. The rewards of `countdown` read the same columns, and pay 0.1 for an answer with the right numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.text import score_rows
from rl4dlm.tasks.countdown import solves
from rl4dlm.tasks.countdown_small import tries_right


def countdown_small(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int] | None] | None = None,
    target: Sequence[int | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 or 0; `None` where numbers or target are none. Needs the columns `numbers` and `target`."""
    return score_rows("countdown_small", _score, completions, {"numbers": numbers, "target": target})


def tries(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int] | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The share of the lines before the answer that are tries, 0 to 1, and 0 without any.

    See `rl4dlm.tasks.countdown_small.tries_right`. `None` where the row has no numbers. Needs the column `numbers`.
    """
    return score_rows("countdown_small:tries", tries_right, completions, {"numbers": numbers})


def _score(text: str, numbers: Any, target: Any) -> float | None:
    solved = solves(text, numbers, target)
    return None if solved is None else float(solved)
