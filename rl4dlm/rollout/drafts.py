"""Several steps of a row in one forward, with the result of one step per forward: draft and verify.

A forward's candidates say what the next step writes, and make a fair guess at what the steps after it write. So a row
is fed with guesses of its next states beside it, one row of the batch each, and all of them make their step; a guess is
kept if the step before it led to exactly that state. What a step does is a function of the state and of noise that is
keyed by row, step and slot, at any temperature: the tokens and everything that is recorded of them are those of
decoding without guesses, and there are as many forwards or fewer. Each has up to `1 + draft_steps` times as many rows,
which costs next to nothing where a forward is bound by the weights it reads, and more than it saves where it is bound
by arithmetic.

FreeDave (arXiv 2510.00294) and Self Speculative Decoding (arXiv 2510.04147), whose tree is one chain here. Differences
from FreeDave's released code: any number of rows and of tokens per step; above temperature 0 the guesses draw with the
noise of the steps they stand for, so that they come true as often as the model's opinion stays the same; with a
threshold only a guess that is the same state is kept (there one that holds a part of it, which changes the result).
Guesses end with the block, as there by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Reading, Scored
from rl4dlm.rollout.record import KEPT
from rl4dlm.rollout.schedules.parts import Step, top
from rl4dlm.rollout.step import Batch

AHEAD = "ahead"

_TRACE = ("commit_step", "block_stop", *KEPT)
"""What is recorded of each slot when it is written; a guess knows nothing of it."""


class DraftBatch(Batch):
    """Rows that are decoded with guesses of their next states. In a forward the rows of the batch are real rows and
    guesses; between forwards there are real rows only."""

    seen: Step | None  # what the last forward showed of each row
    source: Tensor | None  # while guesses are fed, the real row of each row
    depth: Tensor  # and how many steps ahead it is

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.temperature > 0:
            self.reads[AHEAD] = candidates_ahead(self.config.draft_steps, self.schedule.reads)

    def _begin(self) -> None:
        self.seen = self.source = None
        super()._begin()

    def _look(self) -> Step:
        self.seen = super()._look()
        return self.seen

    def _place(self, rows: Tensor | None, columns: Tensor | slice, seen: int | None) -> None:
        if self.source is None:
            super()._place(rows, columns, seen)
            return
        source, own = self.source, self.depth == 0
        if self.guided:
            source, own = torch.cat([source, source + int(own.sum())]), own.repeat(2)
        assert self.store is not None
        if rows is None:
            self.store.place(source, columns, seen, own)
        else:
            self.store.place(source[rows], columns, seen, own[rows])

    def _take(self, keep: Tensor) -> None:
        if self.seen is not None:
            self.seen = _picked(self.seen, keep)
        super()._take(keep)

    def _step(self) -> None:
        guesses = self._guesses()
        counts = torch.stack([real for _, _, real in guesses]).sum(0) if guesses else torch.zeros_like(self.slot)
        if not bool(counts.any()):
            super()._step()
            return
        own = (1 + counts).cumsum(0) - (1 + counts)  # the real rows, among all that are fed
        source = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), 1 + counts)
        depth = torch.arange(len(source), device=source.device) - own[source]
        self.record.guesses[self.slot] += counts
        self._fork(guesses, source, depth)
        fed = {name: getattr(self, name).clone() for name in ("tokens", "masked", "stalled")}
        super()._step()
        wrong = torch.zeros_like(depth, dtype=torch.bool)
        for name, value in fed.items():
            differs = value != getattr(self, name).roll(1, 0)
            wrong |= differs if differs.dim() == 1 else differs.any(-1)
        wrong |= self._finished().roll(1, 0)  # decoding without guesses ends there
        self._join(source, depth, own, wrong & (depth > 0), fed["masked"] & ~self.masked)

    def _guesses(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Guessed states, nearest first: canvas `[R, W]`, masked `[R, W]` and whether the row has that guess `[R]`.

        Each is what the schedule's rules make of the one before if the model's opinion does not change. Rows that enter
        a block have none, for nothing is known of it yet, and a state without open slots is no guess: nothing is left
        to do there.
        """
        if self.seen is None:
            return []
        canvas, masked, real = self.tokens[:, self.width :], self.masked, self.block_step > 0
        guesses = []
        for ahead in range(1, self.config.draft_steps + 1):
            eligible = masked & (self.offsets < self.stop[:, None])
            drawn, read = self.seen.drawn, dict(self.seen.read)
            if AHEAD in read:
                token, confidence, *values = read[AHEAD][..., ahead - 1, :].unbind(-1)
                drawn = drawn._replace(token=token.long(), confidence=confidence.to(drawn.confidence))
                single = [name for name in self.schedule.reads if read[name].dim() == 2]
                read |= {name: value.to(read[name]) for name, value in zip(single, values, strict=True)}
            step = dataclasses.replace(
                self.seen,
                tokens=canvas,
                masked=masked,
                eligible=eligible,
                stop=self.stop,
                drawn=drawn,
                read=read,
                step=self.block_step + ahead - 1,
                total_step=self.total_step + ahead - 1,
                masked_at_start=self.masked_at_start,
            )
            scores = self.schedule.confidence(step)
            if self.config.defer_token_ids:
                deferred = torch.tensor(self.config.defer_token_ids, device=scores.device)
                scores = scores.masked_fill(torch.isin(drawn.token, deferred), -torch.inf)
            commit = self.schedule.commit(step, scores) & eligible
            commit |= top(scores, eligible, (~commit.any(-1)).long())
            canvas, masked = torch.where(commit, drawn.token, canvas), masked & ~commit
            real = real & (eligible & ~commit).any(-1)
            guesses.append((canvas, masked, real))
        return guesses

    def _fork(self, guesses: list[tuple[Tensor, Tensor, Tensor]], source: Tensor, depth: Tensor) -> None:
        """Puts the guesses between the rows; `source` long `[V]` is the row of each, `depth` how far ahead it is."""
        canvases = torch.stack([self.tokens[:, self.width :], *(canvas for canvas, _, _ in guesses)], dim=1)
        masked = torch.stack([self.masked, *(masked for _, masked, _ in guesses)], dim=1)
        self.seen = None  # what it said is in the guesses
        self._take(source)
        self.tokens[:, self.width :] = canvases[source, depth]
        self.masked = masked[source, depth]
        self.stalled = torch.where(depth > 0, 0, self.stalled)
        self.block_step, self.total_step = self.block_step + depth, self.total_step + depth
        self.source, self.depth = source, depth

    def _join(self, source: Tensor, depth: Tensor, own: Tensor, wrong: Tensor, wrote: Tensor) -> None:
        """Keeps of each row the last state on the unbroken chain of guesses that came true, and what led to it.

        Args:
            own: long `[R]`, the real rows among the V. wrong: bool `[V]`, guesses that did not come true.
            wrote: bool `[V, W]`, slots that each wrote in its step.
        """
        rows, deepest = len(own), 1 + int(depth.max())
        right = torch.zeros(rows, deepest, dtype=torch.bool, device=own.device)
        right[source, depth] = ~wrong
        right = right.cumprod(-1).bool()  # [R, D + 1]
        last = own + right.sum(-1) - 1
        by_depth = torch.zeros(rows, deepest, wrote.shape[1], dtype=torch.long, device=own.device)
        by_depth[source, depth] = wrote.long()
        at = own[:, None] + (by_depth * right[..., None]).argmax(
            1
        )  # [R, W], who wrote a slot; the row where nobody did
        trace = {name: getattr(self, name).gather(0, at) for name in _TRACE}
        self._take(last)
        for name, value in trace.items():
            setattr(self, name, value)
        self.source = None


def candidates_ahead(steps: int, reads: Mapping[str, Reading]) -> Reading:
    """A reading `[n, steps, 2 + k]`, float64: the candidates that the same logits give with the noise of the row's next
    steps, their untempered probabilities, and what those k of the schedule's readings say that are single numbers."""

    def read(scored: Scored) -> Tensor:
        found = []
        for ahead in range(1, steps + 1):
            later = dataclasses.replace(scored.places, steps=scored.places.steps + ahead)
            again = dataclasses.replace(scored, places=later)
            drawn, values = again.drawn(), [reading(again) for reading in reads.values()]
            columns = [drawn.token, drawn.confidence, *(value for value in values if value.dim() == 1)]
            found.append(torch.stack([column.double() for column in columns], dim=-1))
        return torch.stack(found, dim=1)

    return read


def _picked(step: Step, rows: Tensor) -> Step:
    """Some rows of a step, as far as guesses need it; the rest is that of the moment."""
    values = {
        field.name: getattr(step, field.name)[rows]
        for field in dataclasses.fields(step)
        if isinstance(getattr(step, field.name), Tensor)
    }
    drawn = step.drawn._replace(**{name: value[rows] for name, value in step.drawn._asdict().items()})
    read = {name: value[rows] for name, value in step.read.items()}
    prompts = [step.prompts[row] for row in rows.tolist()]
    return dataclasses.replace(step, **values, drawn=drawn, read=read, prompts=prompts)
