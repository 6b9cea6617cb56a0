"""Several steps of a row in one forward, with the result of one step per forward: draft and verify.

A forward's candidates say what the next step writes, and make a fair guess at what the steps after it write. So a row
is fed with guesses of its next states beside it, one row of the batch each, and all of them make their step; a guess is
kept if the step before it led to exactly that state. What a step does is a function of the state and of noise that is
keyed by row, step and slot, at any temperature: the tokens and everything that is recorded of them are those of
decoding without guesses, and there are as many forwards or fewer. Each has up to `1 + draft_steps` times as many rows,
which costs next to nothing where a forward is bound by the weights it reads, and more than it saves where it is bound
by arithmetic.

The chain of most likely states is that of FreeDave (arXiv 2510.00294). A model rarely changes its opinion of a token,
but often the order in which it is sure of them, so that states in which the next best slot goes first are worth
guessing too (`draft_width`), as in the trees of Self Speculative Decoding (SSD, arXiv 2510.04147). Here such a state is
not the root of a tree of its own: once the slot that waited is written, too, it is on the chain again.

Differences from FreeDave's released code: any number of rows and of tokens per step; above temperature 0 the guesses
draw with the noise of the steps they stand for, so that they come true as often as the model's opinion stays the same;
with a threshold only a guess that is the same state is kept (there one that holds a part of it, which changes the
result). Guesses end with the block, as there by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Reading, Scored
from rl4dlm.rollout.record import KEPT
from rl4dlm.rollout.schedules.parts import Step, ranks, top
from rl4dlm.rollout.step import Batch

AHEAD = "ahead"

_TRACE = ("commit_step", "block_stop", *KEPT)
"""What is recorded of each slot when it is written; a guess knows nothing of it."""


class DraftBatch(Batch):
    """Rows that are decoded with guesses of their next states. In a forward the rows of the batch are real rows and
    guesses; between forwards there are real rows only."""

    seen: Step | None  # what the last forward showed of each row
    source: Tensor | None  # while guesses are fed, the real row of each row
    ahead: Tensor  # and how many steps further it is

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
        source, own = self.source, self.ahead == 0
        if self.guided:
            source, own = torch.cat([source, source + int(own.sum())]), own.repeat(2)
        assert self.store is not None
        if rows is None:
            self.store.place(source, columns, seen, own)
        else:
            self.store.place(source[rows], columns, seen, own[rows])

    def _shared(self, part: Any) -> tuple[Tensor, Tensor] | None:
        shared = super()._shared(part)
        return shared if self.source is None else None  # guesses are of rows that are under way

    def _take(self, keep: Tensor) -> None:
        if self.seen is not None:
            self.seen = _picked(self.seen, keep)
        super()._take(keep)

    def _step(self) -> None:
        guesses = self._guesses()
        real = torch.stack([torch.ones_like(self.done), *(guess.real for guess in guesses)], dim=1)  # [R, 1 + G]
        if not bool(real[:, 1:].any()):
            super()._step()
            return
        self.record.guesses[self.slot] += real[:, 1:].sum(-1)
        source, which = real.nonzero(as_tuple=True)
        ahead = torch.tensor([0, *(guess.ahead for guess in guesses)], device=source.device)[which]
        canvas = torch.stack([self.tokens[:, self.width :], *(guess.canvas for guess in guesses)], dim=1)
        masked = torch.stack([self.masked, *(guess.masked for guess in guesses)], dim=1)
        self._fork(canvas[source, which], masked[source, which], source, ahead)
        fed = self._state()
        super()._step()
        self._join(fed)

    def _guesses(self) -> list[_Guess]:
        """What may be the next states.

        The most likely one is what the schedule's rules make of the one before if the model's opinion does not change,
        and so on. Beside it, the next best slot goes first and the weakest one waits. Rows that enter a block have no
        guess, for nothing is known of it yet, and a state without open slots is none: nothing is left to do there.
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
                stop=self.stop,
                drawn=drawn,
                read=read,
                step=self.block_step + ahead - 1,
                total_step=self.total_step + ahead - 1,
                masked_at_start=self.masked_at_start,
            )
            allowed, beside = eligible, []
            for _ in range(self.config.draft_width):
                commit, scores = self._rules(dataclasses.replace(step, eligible=allowed))
                going = real & commit.any(-1) & (eligible & ~commit).any(-1)
                beside.append(_Guess(torch.where(commit, drawn.token, canvas), masked & ~commit, going, ahead))
                rank = ranks(scores, allowed).masked_fill(~commit, -1)
                allowed = allowed & ~(commit & (rank == rank.amax(-1, keepdim=True)))
            guesses += beside
            canvas, masked, real = beside[0].canvas, beside[0].masked, beside[0].real
        return guesses

    def _rules(self, step: Step) -> tuple[Tensor, Tensor]:
        """What the schedule writes at a step, bool `[R, W]`, and the scores by which it chooses."""
        scores = self.schedule.confidence(step)
        if self.config.defer_token_ids:
            deferred = torch.tensor(self.config.defer_token_ids, device=scores.device)
            scores = scores.masked_fill(torch.isin(step.drawn.token, deferred), -torch.inf)
        commit = self.schedule.commit(step, scores) & step.eligible
        return commit | top(scores, step.eligible, (~commit.any(-1)).long()), scores

    def _fork(self, canvas: Tensor, masked: Tensor, source: Tensor, ahead: Tensor) -> None:
        """Puts guesses behind the rows that they are of: V states, each so many steps `ahead` of row `source`."""
        self.seen = None  # what it said is in the guesses
        self._take(source)
        self.tokens[:, self.width :], self.masked = canvas, masked
        self.stalled = torch.where(ahead > 0, 0, self.stalled)
        self.block_step, self.total_step = self.block_step + ahead, self.total_step + ahead
        self.source, self.ahead = source, ahead

    def _state(self) -> tuple[Tensor, ...]:
        """What a step depends on besides its number, as far as steps change it."""
        return self.tokens[:, self.width :].clone(), self.masked, self.stalled

    def _join(self, fed: tuple[Tensor, ...]) -> None:
        """Follows each row through the guesses that came true; it goes on from the last of them.

        Args:
            fed: the states `[V, ...]` before the step; those after it are the rows'.
        """
        assert self.source is not None
        source, ended, led_to = self.source, self._finished(), self._state()
        at = (self.ahead == 0).nonzero().squeeze(-1)  # [R], where each row has come to
        wrote = fed[1] & ~self.masked
        writer = at[:, None].expand(-1, wrote.shape[1])  # who wrote a slot; the row itself where nobody did
        for ahead in range(1, self.config.draft_steps + 1):
            true = (self.ahead == ahead) & ~ended[at][source]  # where a row ends, decoding without guesses does, too
            for before, after in zip(fed, led_to, strict=True):
                true &= (before == after[at[source]]).view(len(source), -1).all(-1)
            found = torch.where(true, torch.arange(len(source), device=source.device), -1)
            following = torch.full_like(at, -1).scatter_reduce(0, source, found, "amax")
            ended = ended.index_fill(0, at[following < 0], True)
            at = torch.where(following < 0, at, following)
            writer = torch.where(wrote[at], at[:, None], writer)
        trace = {name: getattr(self, name).gather(0, writer) for name in _TRACE}
        self._take(at)
        for name, value in trace.items():
            setattr(self, name, value)
        self.source = None


@dataclass(frozen=True)
class _Guess:
    """A state that each row may come to."""

    canvas: Tensor  # long [R, W]
    masked: Tensor  # bool [R, W]
    real: Tensor  # bool [R], rows that have it
    ahead: int  # steps


def candidates_ahead(steps: int, reads: Mapping[str, Reading]) -> Reading:
    """A reading `[n, steps, 2 + k]`, float64: the candidates that the same logits give with the noise of the row's next
    steps, their untempered probabilities, and what those k of the schedule's readings say that are single numbers."""

    def read(scored: Scored) -> Tensor:
        found = []
        for ahead in range(1, steps + 1):
            later = scored.later(ahead)
            drawn, values = later.drawn(entropy=False), [reading(later) for reading in reads.values()]
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
