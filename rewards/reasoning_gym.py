"""Rewards for the tasks of reasoning-gym: what its scorers give, in the sandbox (`rl4dlm.grading.reasoning_gym`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rl4dlm.grading.pool import usage
from rl4dlm.grading.reasoning_gym import EXACT, Score, require_scorers, scores
from rl4dlm.grading.text import completion_texts, require_column


def _scores_answers(reward: Callable[..., list[float | None]]) -> Callable[..., list[float | None]]:
    """Has trainers make sure, before anything is trained, that there is a sandbox (`rl4dlm.training.checks`)."""
    reward.requires = require_scorers  # type: ignore[attr-defined]
    return reward


@_scores_answers
def reasoning_gym(
    prompts: Sequence[Any], completions: Sequence[Any], entry: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """The score that the task's own scorer gives the answer, in [0, 1]. Needs the column `entry`.

    Many pay a part for an answer that is nearly right; what some pay for any answer at all is 0. An answer on
    which the scorer fails or hangs scores 0; `None` is for rows without an entry, and for those that could not be
    scored, since others used the batch's time. Logs `reward/deadline_rate`, `reward/scorer_error_rate` and
    `reward/seconds` where TRL passes `log_metric`.
    """
    return [None if score is None else score.value for score in _scores("reasoning_gym", completions, entry, columns)]


@_scores_answers
def solved(
    prompts: Sequence[Any], completions: Sequence[Any], entry: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """1 for the full score, else 0; otherwise as `reasoning_gym`."""
    found = _scores("reasoning_gym:solved", completions, entry, columns)
    return [None if score is None or score.value is None else float(score.value >= EXACT) for score in found]


def _scores(
    name: str, completions: Sequence[Any], entry: Sequence[str | None] | None, columns: dict[str, Any]
) -> list[Score | None]:
    entries = require_column(name, "entry", entry, len(completions))
    given = [(text, one) for text, one in zip(completion_texts(completions), entries, strict=True) if one is not None]
    before = usage().seconds
    found = iter(scores([text for text, _ in given], [one for _, one in given]))
    rows = [None if one is None else next(found) for one in entries]
    if "log_metric" in columns:
        known = [score for score in rows if score is not None]
        columns["log_metric"]("reward/deadline_rate", sum(score.late for score in known) / max(len(known), 1))
        columns["log_metric"]("reward/scorer_error_rate", sum(score.broken for score in known) / max(len(known), 1))
        columns["log_metric"]("reward/seconds", usage().seconds - before)
    return rows
