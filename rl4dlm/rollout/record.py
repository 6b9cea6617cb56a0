"""What a batch writes down while it decodes: one record for all rows of a call, filled by batches of some of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

from rl4dlm.rollout.requests import BLOCKS, FILLING_LOG_PROBS, FILLINGS, NOTED, PREDICTIONS, Answers, Requests
from rl4dlm.rollout.rollout import EventKind, Events, StopReason, Trace
from rl4dlm.rollout.state import State

KEPT = ("raw_log_prob", "log_prob", "confidence", "entropy")
"""Numbers that are kept of each token, as they were when it was committed for good; names of `Drawn`."""

STOP_REASONS = (
    StopReason.COMPLETE, StopReason.EOS, StopReason.STEP_CAP, StopReason.CONSTRAINT_DEAD_END, StopReason.STOP,
)  # fmt: skip
COMPLETE, EOS, STEP_CAP, DEAD_END, STOP = range(len(STOP_REASONS))


@dataclass
class Log:
    """Parts of `Events`, selection log-probabilities and the order of picks; rows are those of the whole call."""

    events: list[dict[str, Tensor]] = field(default_factory=list)
    selections: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # rows, steps, values
    orders: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # rows, places [r, W]

    def add(
        self,
        kind: EventKind,
        rows: Tensor,
        steps: Tensor,
        positions: Tensor,
        tokens: Tensor,
        **numbers: Tensor,
    ) -> None:
        """Appends events `[e]` of one kind; numbers that are not given are 0."""
        zeros = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        values = {"raw_log_prob": zeros, "log_prob": zeros, "confidence": zeros, **numbers}
        kinds = torch.full_like(rows, int(kind))
        self.events.append(
            {"row": rows, "step": steps, "kind": kinds, "position": positions, "token": tokens, **values}
        )

    def sorted_events(self, dtype: torch.dtype) -> Events:
        """All of them, by row and step; within a step in the order of adding."""
        names = [f.name for f in fields(Events)]
        empty = torch.zeros(0, dtype=torch.long)
        columns = {n: torch.cat([part[n] for part in self.events]) if self.events else empty for n in names}
        by_step = columns["step"].argsort(stable=True)
        order = by_step[columns["row"][by_step].argsort(stable=True)]
        real = ("raw_log_prob", "log_prob", "confidence")
        return Events(**{n: c[order].to(dtype) if n in real else c[order] for n, c in columns.items()})

    def selection_log_prob(self, like: Tensor, steps: int) -> Tensor:
        """`[N, S]`, for N rows and with the dtype and device of `like` `[N, L]`."""
        dense = like.new_zeros(len(like), steps)
        for row, step, values in self.selections:
            dense[row, step] = values.to(dense)
        return dense

    def commit_rank(self, commit_step: Tensor) -> Tensor | None:
        """long `[N, L]`, of the tokens that were committed; None where steps write their tokens in no order."""
        if not self.orders:
            return None
        dense = torch.full_like(commit_step, -1)
        for row, places in self.orders:
            width = places.shape[1]
            dense[row, :width] = torch.where(places >= 0, places, dense[row, :width])
        return dense.masked_fill(commit_step < 0, -1)


@dataclass
class Record:
    """What is known of every row; batches write into views of it."""

    canvas: Tensor  # [N, L]
    hinted: Tensor  # [N, L]
    commit_step: Tensor  # [N, L]
    raw_log_prob: Tensor  # [N, L]
    log_prob: Tensor  # [N, L]
    confidence: Tensor  # [N, L]
    entropy: Tensor  # [N, L]
    block_stop: Tensor  # [N, L]
    steps: Tensor  # [N]
    nfe: Tensor  # [N]
    extra_forwards: Tensor  # [N]
    guesses: Tensor  # [N]
    reason: Tensor  # [N], index into STOP_REASONS
    start_length: Tensor  # [N]
    length: Tensor  # [N]
    log: Log
    answers: Answers  # to what is recorded on request
    first: int = 0  # the row of the whole call that this part starts with

    @classmethod
    def empty(cls, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Record:
        """A record in which nothing has happened."""
        shape = (rows, length)

        def per_row(value: int = 0) -> Tensor:
            return torch.full((rows,), value, dtype=torch.long, device=device)

        return cls(
            canvas=torch.zeros(shape, dtype=torch.long, device=device),
            hinted=torch.zeros(shape, dtype=torch.bool, device=device),
            commit_step=torch.full(shape, -1, dtype=torch.long, device=device),
            raw_log_prob=torch.zeros(shape, dtype=dtype, device=device),
            log_prob=torch.zeros(shape, dtype=dtype, device=device),
            confidence=torch.zeros(shape, dtype=dtype, device=device),
            entropy=torch.zeros(shape, dtype=dtype, device=device),
            block_stop=torch.full(shape, -1, dtype=torch.long, device=device),
            steps=per_row(),
            nfe=per_row(),
            extra_forwards=per_row(),
            guesses=per_row(),
            reason=per_row(COMPLETE),
            start_length=per_row(length),
            length=per_row(length),
            log=Log(),
            answers=Answers(),
        )

    def begin(self, start: State, forwards: int) -> None:
        """Writes down what is known of rows that go on from a state, as if their steps, of `forwards` forwards each,
        had been made here."""
        drawn = start.commit_step >= 0
        for name in ("canvas", "hinted", "commit_step", "block_stop", *KEPT):
            value, own = getattr(start, name), getattr(self, name)
            if value is not None:
                own.copy_(torch.where(drawn.to(own.device), value.to(own), own) if name in KEPT else value)
        self.steps.copy_(start.steps)
        self.nfe.copy_(start.steps * forwards)

    def part(self, rows: slice) -> Self:
        """The same for some rows: views, and the same log."""
        views = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return type(self)(**{**vars(self), **views, "first": self.first + (rows.start or 0)})

    def trace(self, *, drawn: bool, monotone: bool, resizes: bool, draws_positions: bool, requests: Requests) -> Trace:
        """How the rows came about; `drawn`: at a temperature above 0, `monotone`: each slot is written once,
        `resizes`: the canvas can change its length, `draws_positions`: steps draw which slots they write."""
        steps = int(self.steps.max()) if len(self.steps) else 0
        dtype = self.raw_log_prob.dtype
        seen, allowed, chosen = (self.answers.per_step(name, self.raw_log_prob, steps) for name in NOTED)
        return Trace(
            self.commit_step,
            self.raw_log_prob,
            self.log_prob if drawn else None,
            self.steps,
            events=None if monotone else self.log.sorted_events(dtype),
            selection_log_prob=self.log.selection_log_prob(self.raw_log_prob, steps) if draws_positions else None,
            start_length=self.start_length if resizes else None,
            length=self.length if resizes else None,
            confidence=self.confidence,
            entropy=self.entropy if "entropy" in requests.names else None,
            block_stop=self.block_stop,
            commit_rank=self.log.commit_rank(self.commit_step),
            predictions=self.answers.completions(requests, PREDICTIONS, self.raw_log_prob, steps),
            fillings=self.answers.completions(requests, FILLINGS, self.raw_log_prob, steps),
            filling_log_probs=self.answers.completions(requests, FILLING_LOG_PROBS, self.raw_log_prob, steps),
            flagged=self.answers.flags(requests, self.raw_log_prob, steps),
            blocks=self.answers.per_step(BLOCKS, self.raw_log_prob, steps, -1),
            policy_features=seen,
            policy_allowed=allowed,
            policy_chosen=chosen,
        )

    def stop_reasons(self) -> list[StopReason]:
        """One per row."""
        return [STOP_REASONS[code] for code in self.reason.tolist()]
