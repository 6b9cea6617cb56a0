"""Text of rows: what a client is shown of a row that ended, and of one that is under way.

Owns the agreement between the two: the parts of a stream are the whole text, cut up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.stopping import Ends, StopStrings


@dataclass(frozen=True)
class Row:
    """A row that ended. T: tokens, the end-of-sequence token included where the model wrote one.

    Args:
        ids: T token ids. steps: at which of the row's steps each was written, from 0 on; -1: given by the schedule.
        log_probs: of each under the model's own softmax when it was written.
        sampled_log_probs: under what it was drawn from; None at temperature 0.
        num_steps, forwards: that the row took. reason: why it ended, see `StopReason`.
    """

    ids: list[int]
    steps: list[int]
    log_probs: list[float]
    sampled_log_probs: list[float] | None
    num_steps: int
    forwards: int
    reason: str


def rows_of(rollout: Rollout) -> list[Row]:
    """The rows of a rollout, without the end-of-sequence tokens that stand in for what was cut off."""
    trace, rows = rollout.trace, []
    kept = rollout.valid & ((trace.commit_step >= 0) | rollout.hinted)
    for number, mask in enumerate(kept):
        rows.append(
            Row(
                ids=rollout.canvas[number][mask].tolist(),
                steps=trace.commit_step[number][mask].tolist(),
                log_probs=trace.raw_log_prob[number][mask].tolist(),
                sampled_log_probs=None if trace.log_prob is None else trace.log_prob[number][mask].tolist(),
                num_steps=int(trace.steps[number]),
                forwards=int(rollout.nfe[number] + rollout.extra_forwards[number]),
                reason=str(rollout.stop_reason[number]),
            )
        )
    return rows


@dataclass(frozen=True)
class Reader:
    """Makes text of a request's rows.

    Args:
        tokenizer: of the model. ends: its end-of-sequence tokens. stop: where rows end besides. shown: the texts that
            the text is cut at.
    """

    tokenizer: Any
    ends: Collection[int]
    stop: Ends | None
    shown: StopStrings | None

    @classmethod
    def of(cls, tokenizer: Any, spec: DiffusionSpec, stop: Ends | None, shown: StopStrings | None) -> Reader:
        """For a model's rows."""
        return cls(tokenizer, frozenset(spec.eos_token_ids), stop, shown)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a row."""
        text = self.plain(ids)
        return text if self.shown is None else self.shown.cut(text)

    def plain(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        text: str = self.tokenizer.decode([i for i in ids if i not in self.ends], skip_special_tokens=True)
        return text

    def settled(self, ids: Sequence[int]) -> str:
        """What of a row's text is certain once its first tokens are these, whatever follows.

        The end is held back where it may be half of a character or the beginning of a text to stop at.
        """
        place = None if self.stop is None else self.stop(ids)
        text = self.plain(ids if place is None else ids[:place])
        if self.shown is not None:
            cut = self.shown.cut(text)
            if cut != text:
                return cut
            text = text[: len(text) - max(_begun(text, string) for string in self.shown.strings)]
        return text.rstrip("\ufffd")

    def finish(self, ids: Sequence[int]) -> str:
        """OpenAI's word for why a row ended: `"stop"` at an end, `"length"` without one."""
        if any(token in self.ends for token in ids):
            return "stop"
        texts = None if self.stop is None else replace(self.stop, most=None)
        return "stop" if texts is not None and texts(ids) is not None else "length"

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, special ones by their names."""
        return [self.tokenizer.decode([token]) for token in ids]

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Where in the text each token begins."""
        return [len(self.plain(ids[:count])) for count in range(len(ids))]


def _begun(text: str, string: str) -> int:
    """How many characters at the end of a text begin a string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
