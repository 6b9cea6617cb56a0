"""Pays for fewer forwards where another reward says that the answer is right.

An example of a reward that sees the rollout: `nfe` is the number of forwards that each completion took. What is right
is said by a reward of this folder, named by the column `speed_of` or `few_clue_sudoku` without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl4dlm.grading import load_reward


def speed(
    prompts: Sequence[Any], completions: Sequence[Any], nfe: Sequence[int] | None = None, **columns: Any
) -> list[float | None]:
    """1 / NFE of right completions, 0 of wrong ones, `None` where rightness cannot be told; at most 1.

    A completion is right where the reward named by the column `speed_of` (default `few_clue_sudoku`) is above 0. Raises
    ValueError outside of a trainer of this library, where nobody knows the number of forwards.
    """
    if nfe is None:
        raise ValueError("speed needs nfe, the forwards of each completion, which the trainers of rl4dlm hand over")
    named = set(columns.pop("speed_of", None) or ["few_clue_sudoku"])
    if len(named) > 1:
        raise ValueError(f"speed_of names several rewards, {', '.join(sorted(named))}; a run has one")
    right = load_reward(named.pop())(prompts=prompts, completions=completions, **columns)
    return [
        None if value is None else (1.0 / max(forwards, 1) if value > 0 else 0.0)
        for value, forwards in zip(right, nfe, strict=True)
    ]
