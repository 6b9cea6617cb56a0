"""Rewards of speed: how many tokens a completion wrote per forward, or how few forwards it took.

Examples of rewards that see the rollout: `nfe` is the number of forwards that each completion took part in, those of
guidance and those that finish a block included, and `tokens_per_forward` the canvas tokens that it wrote over these.

`tokens_per_forward` and `inverse_nfe` are the plain numbers, for trainers that normalise rewards apart and know
themselves what is right (`LightningRLTrainer`). Alone, or added to a reward of correctness, they pay for wrong answers
that are fast. `correct_tokens_per_forward` and `speed` are gated: a wrong answer earns nothing, however fast. What is
right is said by a reward of this folder, named by the column `speed_of`, or `few_clue_sudoku` without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl4dlm.grading import load_reward


def tokens_per_forward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tokens_per_forward: Sequence[float] | None = None,
    **columns: Any,
) -> list[float]:
    """Canvas tokens written over forwards, right or wrong. ValueError outside of a trainer of this library."""
    return list(_seen("tokens_per_forward", "tokens_per_forward", tokens_per_forward))


def inverse_nfe(
    prompts: Sequence[Any], completions: Sequence[Any], nfe: Sequence[int] | None = None, **columns: Any
) -> list[float]:
    """1 / NFE, right or wrong; at most 1. ValueError outside of a trainer of this library."""
    return [1.0 / max(forwards, 1) for forwards in _seen("inverse_nfe", "nfe", nfe)]


def correct_tokens_per_forward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tokens_per_forward: Sequence[float] | None = None,
    **columns: Any,
) -> list[float | None]:
    """`tokens_per_forward` of right completions, 0 of wrong ones, `None` where rightness cannot be told.

    A completion is right where the reward named by the column `speed_of` (default `few_clue_sudoku`) is above 0. Raises
    ValueError outside of a trainer of this library.
    """
    values = _seen("correct_tokens_per_forward", "tokens_per_forward", tokens_per_forward)
    return _gated(values, prompts, completions, columns)


def speed(
    prompts: Sequence[Any], completions: Sequence[Any], nfe: Sequence[int] | None = None, **columns: Any
) -> list[float | None]:
    """1 / NFE of right completions, 0 of wrong ones, `None` where rightness cannot be told; at most 1.

    A completion is right where the reward named by the column `speed_of` (default `few_clue_sudoku`) is above 0. Raises
    ValueError outside of a trainer of this library, where nobody knows the number of forwards.
    """
    return _gated([1.0 / max(forwards, 1) for forwards in _seen("speed", "nfe", nfe)], prompts, completions, columns)


def _seen(reward: str, name: str, values: Sequence[Any] | None) -> Sequence[Any]:
    if values is None:
        raise ValueError(f"{reward} needs {name} of each completion, which the trainers of rl4dlm hand over")
    return values


def _gated(
    values: Sequence[float], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> list[float | None]:
    """The values of right completions, and 0 for wrong ones."""
    named = set(columns.pop("speed_of", None) or ["few_clue_sudoku"])
    if len(named) > 1:
        raise ValueError(f"speed_of names several rewards, {', '.join(sorted(named))}; a run has one")
    right = load_reward(named.pop())(prompts=prompts, completions=completions, **columns)
    return [
        None if correct is None else (value if correct > 0 else 0.0)
        for correct, value in zip(right, values, strict=True)
    ]
