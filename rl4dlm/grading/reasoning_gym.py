"""Scores of answers to tasks of reasoning-gym, which its scorers give in the sandbox.

Owns what a row's entry says, where the answer stands in a completion, and what a scorer's word is worth. The scorers
are in `rl4dlm.grading.reasoning_gym_scorer`; they read hostile text with means that no process that trains should, so
that a machine without a sandbox is refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rl4dlm._optional import require
from rl4dlm.grading.pool import current_settings
from rl4dlm.grading.sandbox.data import encode
from rl4dlm.grading.text import last_answer_block
from rl4dlm.grading.workers import WorkerPool

EXTRA = "reasoning-gym"
EXACT = 1.0 - 1e-9
_LONGEST = 1 << 20  # bytes of an entry


class Score(NamedTuple):
    """What an answer is worth.

    Attributes:
        value: in [0, 1]; None where it could not be scored.
        late: whether the scorer ran out of time.
        broken: whether the scorer raised, or its process ended.
    """

    value: float | None
    late: bool = False
    broken: bool = False


def entry_text(task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], *, tags: bool) -> str:
    """The column `entry` of a row.

    Args:
        task: of reasoning-gym.
        settings: of the task, but for the seed and the size.
        entry: question, answer and metadata.
        tags: whether the answer must stand in `<answer>` tags; else it is the whole completion.

    Raises:
        NotData: an entry or settings that are no plain data.
    """
    texts = [encode(dict(part), _LONGEST).decode() for part in (settings, entry)]
    return json.dumps({"task": task, "settings": texts[0], "entry": texts[1], "tags": tags})


def scores(texts: Sequence[str], entries: Sequence[str]) -> list[Score]:
    """The score of each completion for its entry.

    What a scorer pays for an answer that says nothing is 0 here, see `reasoning_gym_scorer.score`. An answer on which
    the scorer raises, takes longer than `deadline` of `current_settings`, or loses its process, scores 0: all of that
    an answer can bring about. None is for those whose turn did not come, since others used the batch's time or the
    machine failed.

    Raises:
        ImportError: reasoning-gym is not installed.
        RuntimeError: this machine has no sandbox.
    """
    read = [json.loads(entry) for entry in entries]
    answers = [last_answer_block(text) if one["tags"] else text.strip() for text, one in zip(texts, read, strict=True)]
    given = [row for row, answer in enumerate(answers) if answer]
    found = [Score(0.0)] * len(answers)
    if given:
        items = [[read[row]["task"], read[row]["settings"], read[row]["entry"], answers[row]] for row in given]
        outcomes = _pool().map(items, deadline=current_settings().deadline)
        for row, outcome in zip(given, outcomes, strict=True):
            if outcome.lost:
                found[row] = Score(None)
            elif outcome.error is not None:
                late = outcome.error == "deadline"
                found[row] = Score(0.0, late, not late)
            else:
                found[row] = Score(_worth(outcome.value))
    return found


def require_scorers() -> None:
    """Makes sure, before anything is trained, that answers can be scored.

    Raises:
        ImportError: reasoning-gym is not installed.
        RuntimeError: this machine has no sandbox; the message says what is missing.
    """
    _pool().require()


def _worth(value: Any) -> float:
    """A scorer's word, which came out of a process that has read the answer."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return 0.0  # also for what is no number
    return min(1.0, float(value))


@functools.cache
def _pool() -> WorkerPool:
    require("reasoning_gym", extra=EXTRA, purpose="a task of reasoning-gym")
    return WorkerPool("rl4dlm.grading.reasoning_gym_scorer:score", preload=("reasoning_gym",), sealed=True)
