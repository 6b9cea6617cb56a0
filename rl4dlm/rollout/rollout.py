"""What leaves the engine: the tokens and everything that is known about how they came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl4dlm.rollout.state import State

if TYPE_CHECKING:
    from rl4dlm.rollout.decoding import DecodingConfig


class StopReason(StrEnum):
    """Why a row ended. Members are strings, and equal to their values."""

    COMPLETE = "complete"
    """Every slot is written."""
    EOS = "eos"
    """Stopped early: the valid part is written."""
    MAX_STEPS = "max_steps"
    """Every slot is written, but a canvas of random tokens was still changing or unsure."""
    STEP_CAP = "step_cap"
    """The schedule did not come to an end, so that the engine wrote the rest at once."""
    CONSTRAINT_DEAD_END = "constraint_dead_end"
    """Nothing that the constraint admits was among the candidates."""
    STOP = "stop"
    """What the caller waits for is written (`RolloutEngine.generate(stop=...)`); the rest is cut off."""


class EventKind(IntEnum):
    """What can happen to a slot."""

    COMMIT = 0
    """An open slot is written."""
    REMASK = 1
    """A written slot is open again; the event's token is the one that is lost."""
    REPLACE = 2
    """A written slot gets another token."""
    INSERT = 3
    """A slot is put in at the position, open (the mask token) or given; those from there on move right."""
    TRUNCATE = 4
    """The slots from the position on are cut off; the event's token is -1."""
    DELETE = 5
    """The slot is taken out; those behind it move left. The event's token is the one that is lost, -1 where that is
    cut off because the block would be too long."""


@dataclass
class Events:
    """Everything that happened, in order of rows, their steps, and what came first within a step. E events.

    Args:
        row: long `[E]`, row of the rollout. step: long `[E]`, the row's own step. kind: long `[E]`, see `EventKind`.
        position: long `[E]`, canvas offset at that moment. token: long `[E]`.
        raw_log_prob, log_prob: float `[E]`, as in `Trace`, for tokens that the model wrote and edits that it made; 0
            elsewhere.
        confidence: float `[E]`, the schedule's probability of the candidate; 0 where there is none.
    """

    row: Tensor
    step: Tensor
    kind: Tensor
    position: Tensor
    token: Tensor
    raw_log_prob: Tensor
    log_prob: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def of(self, kind: EventKind) -> Events:
        """Those of one kind."""
        chosen = self.kind == kind
        return Events(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


@dataclass
class Refinement:
    """Every state of canvases whose tokens may change after they were accepted. S: steps, C: tokens of one canvas.

    A row denoises one canvas after another; what is recorded of a step is about the canvas that it works on. A token
    that was not accepted was replaced by a random one.

    Args:
        tokens: int32 `[N, S, C]`, the canvas that the model saw at each step; -1 behind a row's last step.
        accepted: bool `[N, S, C]`, where the next state has the candidate of this step. At the last step of a canvas it
            decides nothing: the most probable tokens are the result.
    """

    tokens: Tensor
    accepted: Tensor


@dataclass
class Trace:
    """How a canvas was written.

    Args:
        commit_step: long `[N, L]`, the row's own step at which a token was committed for good; -1 where none was drawn:
            a given slot, or one that was still open when the row stopped at its end-of-sequence token.
        raw_log_prob: float `[N, L]`, log-probability at drawing time under the model's own softmax over the whole
            vocabulary: untempered, before guidance, penalties and suppressed tokens; 0 at -1.
        log_prob: float `[N, L]`, log-probability of the distribution really drawn from (without the mask token,
            tempered, filtered), or None where nothing was drawn: at temperature 0, or where the most probable tokens of
            the last step are the result.
        steps: long `[N]`, number of steps of each row.
        refinement: the states in between, where a canvas of random tokens is refined; None elsewhere.
        events: everything that happened, where a schedule can take tokens back, replace them or change the length;
            None where each slot is written once, so that `commit_step` says everything.
        selection_log_prob: float `[N, S]`, log-probability of the choice of positions made at each step, 0 behind a
            row's last; None where positions follow from the candidates.
        start_length: long `[N]`, slots that a row started with; None: all of the canvas.
        length: long `[N]`, slots that it ended with; None: all of the canvas.
        confidence: float `[N, L]`, probability of each token when it was committed, under the untempered softmax after
            guidance and options, which schedules look at; 0 at -1. None where a canvas of random tokens is refined.
        entropy: float `[N, L]`, of that softmax, in nats. None likewise, and unless it was asked for.
        block_stop: long `[N, L]`, end of the block that was active when each token was committed, a canvas offset, so
            that blocks that are not on a grid can be told; -1 at -1. None likewise.
        commit_rank: long `[N, L]`, the place of each token in the order in which its step chose slots, from 0; -1 at -1
            and in steps that were made before a row was taken up from a state. None where steps choose in no order.
        predictions: int32 `[N, K, L]`, the canvas before each step with every open slot filled by its most probable
            token. K: steps of the longest row, or `record_steps` if the settings name them; -1 where a row made no such
            step (or made it before it was taken up from a state), and at slots that did not exist. This and what
            follows: None unless `DecodingConfig.record` asks for it.
        fillings: int32 `[N, K, Z, L]`, likewise with open slots drawn, each by itself, from the distribution that the
            step draws from; the first of the Z has the step's own candidates.
        filling_log_probs: float `[N, K, Z, L]`, of these draws; 0 at written slots and at temperature 0.
        flagged: bool `[N, S]`, steps at which the schedule's rule would have written nothing, so that the engine wrote
            the best candidate. Rules that always write the best one themselves have none.
        policy_features: float `[N, S, ...]`, what a learned policy saw at each step, 0 where it was not asked.
        policy_allowed, policy_chosen: bool `[N, S, A]`, which of A actions it could and did choose; none where it was
            not asked. The log-probability of the choice is in `selection_log_prob`.
        blocks: long `[N, S, 2]`, first slot of the block active at each step, and the one behind its last; -1 behind.
    """

    commit_step: Tensor
    raw_log_prob: Tensor
    log_prob: Tensor | None
    steps: Tensor
    refinement: Refinement | None = None
    events: Events | None = None
    selection_log_prob: Tensor | None = None
    start_length: Tensor | None = None
    length: Tensor | None = None
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    block_stop: Tensor | None = None
    predictions: Tensor | None = None
    fillings: Tensor | None = None
    filling_log_probs: Tensor | None = None
    flagged: Tensor | None = None
    commit_rank: Tensor | None = None
    policy_features: Tensor | None = None
    policy_allowed: Tensor | None = None
    policy_chosen: Tensor | None = None
    blocks: Tensor | None = None


@dataclass
class Rollout:
    """Finished rows, in the order `row = prompt * num_generations + generation`.

    Args:
        prompt_ids: N lists of prompt token ids, without padding.
        canvas: long `[N, L]`, all completion slots; slots behind an early stop or a cut hold the end-of-sequence token.
        valid: bool `[N, L]`, the canvas up to and including the first end-of-sequence token.
        hinted: bool `[N, L]`, slots that were given, by the caller or by the schedule, and so are nobody's choice.
        trace: how the canvas was written.
        nfe: long `[N]`, forwards each row took part in; guidance counts two.
        extra_forwards: long `[N]`, forwards of other models that a schedule asks for advice.
        stop_reason: per row, see `StopReason`.
        row_ids: what keyed each row's randomness.
        schedule: name of the schedule. cache: name of the cache policy.
        exact: whether every logit was that of a full forward of the tokens in the trace; False for caches that
            approximate and for schedules that feed something else than tokens.
        seed: of the run. weight_version: the engine's, as set by its owner.
        mask_token_id: of the model; None if it has none.
        decoding: the `DecodingConfig` that it was decoded with, its blocks those of the model.
        recorded: whether `trace` says how the canvas came about. Of another library's engine it does not: then it tells
            written slots from others and no more, log-probabilities are NaN, and forwards 0.
        guesses: long `[N]`, guessed states that were fed beside each row (`draft_steps`); `trace.steps` less `nfe`,
            halved with guidance, came true. None where a canvas of random tokens is refined.
    """

    prompt_ids: list[list[int]]
    canvas: Tensor
    valid: Tensor
    hinted: Tensor
    trace: Trace
    nfe: Tensor
    stop_reason: list[StopReason]
    row_ids: list[int]
    schedule: str
    cache: str
    exact: bool
    seed: int
    mask_token_id: int | None
    extra_forwards: Tensor
    weight_version: int | None = None
    decoding: DecodingConfig | None = None
    guesses: Tensor | None = None
    recorded: bool = True

    def __len__(self) -> int:
        return len(self.canvas)

    @property
    def completion_ids(self) -> list[list[int]]:
        """The valid part of each row as a list of token ids; never empty."""
        return [row[mask].tolist() for row, mask in zip(self.canvas, self.valid, strict=True)]

    def replaced(self, rows: Mapping[int, int], other: Rollout) -> Rollout:
        """A copy in which some rows, the keys, are those rows of another rollout of the same canvas, the values.

        Raises ValueError for canvases of random tokens, or if the two were decoded differently.
        """
        order = [len(self) + rows[i] if i in rows else i for i in range(len(self))]
        joined = self.picked(other, order)
        return joined if rows else self

    def picked(self, other: Rollout, order: Sequence[int]) -> Rollout:
        """Rows of two rollouts of the same canvas in this order; those of the other one are numbered on behind these.

        Raises ValueError for canvases of random tokens, or if the two were decoded differently.
        """
        order = list(order)
        same = ("schedule", "cache", "seed", "mask_token_id", "weight_version")
        differing = [name for name in same if getattr(self, name) != getattr(other, name)]
        if differing or self.canvas.shape[1] != other.canvas.shape[1]:
            raise ValueError(f"rows of another rollout cannot take a place here: {differing or ['canvas']} differ")
        if self.trace.refinement is not None or other.trace.refinement is not None:
            raise ValueError("rows of a canvas of random tokens cannot be replaced")
        index = torch.tensor(order, device=self.canvas.device)

        def picked(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            return None if mine is None or others is None else torch.cat([mine, others])[index]

        tensors: dict[str, Any] = {
            f.name: picked(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        mine, others = self.trace, other.trace
        per_row = (
            "commit_step", "raw_log_prob", "log_prob", "steps", "start_length", "length", "confidence", "entropy",
            "block_stop", "commit_rank",
        )  # fmt: skip
        trace: dict[str, Any] = {name: picked(getattr(mine, name), getattr(others, name)) for name in per_row}
        for name, blank in _PER_STEP.items():
            ours, theirs = getattr(mine, name), getattr(others, name)
            wide = None if ours is None or theirs is None else picked(*_as_wide(ours, theirs, blank))
            trace[name] = wide
        events = None
        if mine.events is not None and others.events is not None:
            events = _picked_events(mine.events, others.events, order, len(self))
        lists: dict[str, Any] = {
            name: [([*getattr(self, name), *getattr(other, name)])[i] for i in order]
            for name in ("prompt_ids", "stop_reason", "row_ids")
        }
        return replace(
            self,
            **tensors,
            **lists,
            trace=Trace(**trace, events=events),
            exact=self.exact and other.exact,
        )

    def state_at(self, steps: int | Sequence[int] | Tensor) -> State:
        """The state of each row after some of its steps, for `RolloutEngine.generate(start=...)`.

        Args:
            steps: how many, one number for all rows or one per row; a row that made fewer is as it ended.

        Raises ValueError for a negative number, and where slots are not written once and for good.
        """
        trace = self.trace
        if trace.events is not None or trace.refinement is not None or trace.length is not None:
            raise ValueError(
                f"schedule={self.schedule!r} can change what is written, so that no state follows from the steps of "
                "commitment; decode with a schedule that writes each slot once"
            )
        made = torch.as_tensor(steps, dtype=torch.long, device=self.canvas.device).expand(len(self))
        if bool((made < 0).any()):
            raise ValueError(f"steps={steps} is not allowed; it must be 0 or larger")
        made = torch.minimum(made, trace.steps)
        written = (trace.commit_step >= 0) & (trace.commit_step < made[:, None])
        open_slot = -1 if self.mask_token_id is None else self.mask_token_id

        def kept(value: Tensor) -> Tensor:
            return torch.where(written, value, 0)

        assert trace.confidence is not None and trace.block_stop is not None
        return State(
            canvas=torch.where(written | self.hinted, self.canvas, open_slot),
            commit_step=torch.where(written, trace.commit_step, -1),
            steps=made,
            hinted=self.hinted,
            raw_log_prob=kept(trace.raw_log_prob),
            confidence=kept(trace.confidence),
            log_prob=None if trace.log_prob is None else kept(trace.log_prob),
            entropy=None if trace.entropy is None else kept(trace.entropy),
            block_stop=torch.where(written, trace.block_stop, -1),
            exact=self.exact,
        )

    def completion_at(self, step: int) -> Tensor:
        """What each row would have become, had all that was open before this step been written at once.

        Args:
            step: a row's own step, from 0. Rows that made fewer are as they ended.

        Returns:
            long `[N, L]`: written tokens, and the most probable ones of open slots; -1 at slots that did not exist.

        Raises ValueError if that was not recorded.
        """
        predictions, asked = self.trace.predictions, None if self.decoding is None else self.decoding.record_steps
        if predictions is None:
            raise ValueError('predictions were not recorded; DecodingConfig(record=("predictions",)) asks for them')
        if step < 0 or (asked is not None and step not in asked):
            allowed = "0 and larger" if asked is None else ", ".join(map(str, asked))
            raise ValueError(f"step={step} was not recorded; allowed: {allowed}")
        made = self.trace.steps > step
        column = step if asked is None else asked.index(step)
        if column >= predictions.shape[1]:
            return self.canvas.clone()
        found = torch.where(made[:, None], predictions[:, column].long(), self.canvas)
        if bool((found[made] < 0).all(-1).any()):
            raise ValueError(f"step={step} of some rows was made before they were taken up from a state")
        return found

    def states(self) -> Iterator[Tensor]:
        """The canvas `[N, L]` that the model saw before each step, from the first step to the longest row's last.

        A row that needed fewer steps keeps its final state. Slots that nothing was written to yet hold the mask token,
        or -1 if there is none; slots that do not exist (in canvases that change their length) hold -1.
        """
        if self.trace.events is not None:
            yield from self._replayed(self.trace.events)
            return
        commit_step, last = self.trace.commit_step, int(self.trace.steps.max()) if len(self) else 0
        open_slot = -1 if self.mask_token_id is None else self.mask_token_id
        refinement = self.trace.refinement
        for step in range(last):
            written = torch.where(commit_step < 0, self.hinted, commit_step < step)
            state = torch.where(written, self.canvas, open_slot)
            if refinement is not None:
                rows = (self.trace.steps > step).nonzero().squeeze(-1)
                first = written[rows].sum(-1, keepdim=True)  # canvases are finished from left to right
                places = first + torch.arange(refinement.tokens.shape[2], device=first.device)
                state[rows[:, None], places] = refinement.tokens[rows, step].long()
            yield state

    def _replayed(self, events: Events) -> Iterator[Tensor]:
        assert self.mask_token_id is not None
        if self.trace.length is None:
            yield from self._rewritten(events)
            return
        by_step: dict[int, list[tuple[int, int, int, int]]] = {}
        columns = (events.step, events.row, events.kind, events.position, events.token)
        for step, *event in zip(*(column.tolist() for column in columns), strict=True):
            by_step.setdefault(step, []).append((event[0], event[1], event[2], event[3]))
        start = [self.canvas.shape[1]] * len(self)
        if self.trace.start_length is not None:
            start = self.trace.start_length.tolist()
        # Slots that a schedule gives are inserted, so those given from the start are the caller's.
        given = self.hinted if self.trace.length is None else torch.zeros_like(self.hinted)
        rows = [
            [int(token) if known else self.mask_token_id for token, known in zip(ids[:n], mask, strict=False)]
            for ids, mask, n in zip(self.canvas, given, start, strict=True)
        ]
        for step in range(int(self.trace.steps.max()) if len(self) else 0):
            yield self._padded(rows)
            for row, kind, position, token in by_step.get(step, ()):
                if kind == EventKind.INSERT:
                    rows[row].insert(position, token)
                elif kind == EventKind.TRUNCATE:
                    del rows[row][position:]
                elif kind == EventKind.DELETE:
                    del rows[row][position]
                else:
                    rows[row][position] = self.mask_token_id if kind == EventKind.REMASK else token

    def _rewritten(self, events: Events) -> Iterator[Tensor]:
        """The states where no slot comes or goes; of what happens to a slot in one step the last thing counts."""
        state = torch.where(self.hinted, self.canvas, self.mask_token_id)  # type: ignore[arg-type]
        order = events.step.argsort(stable=True)
        last = int(self.trace.steps.max()) if len(self) else 0
        counts = torch.bincount(events.step, minlength=last)[:last].tolist()
        for part in order.split([*counts, len(order) - sum(counts)])[:last]:
            yield state.clone()
            for kind in (EventKind.COMMIT, EventKind.REPLACE, EventKind.REMASK):
                chosen = part[events.kind[part] == kind]
                value = events.token[chosen] if kind != EventKind.REMASK else self.mask_token_id
                state[events.row[chosen], events.position[chosen]] = value  # type: ignore[assignment]

    def _padded(self, rows: list[list[int]]) -> Tensor:
        # Slots are put in before what exceeds the canvas is cut, but never stay beyond it.
        width = self.canvas.shape[1]
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=self.canvas.device)


def _picked_events(mine: Events, others: Events, order: list[int], behind: int) -> Events:
    """The events of rows of two rollouts, the second one's numbered from `behind` on; `order`: the rows to keep."""
    row = torch.cat([mine.row, others.row + behind])
    found = [(row == source).nonzero().squeeze(-1) for source in order]
    index = torch.cat(found)
    columns = {f.name: torch.cat([getattr(mine, f.name), getattr(others, f.name)])[index] for f in fields(Events)}
    counts = torch.tensor([len(part) for part in found], device=row.device)
    columns["row"] = torch.arange(len(order), device=row.device).repeat_interleave(counts)
    return Events(**columns)


_PER_STEP: dict[str, float] = {
    "selection_log_prob": 0.0,
    "predictions": -1,
    "fillings": -1,
    "filling_log_probs": 0.0,
    "flagged": False,
    "policy_features": 0.0,
    "policy_allowed": False,
    "policy_chosen": False,
    "blocks": -1,
}
"""What a trace has per step, and what stands behind a row's last one."""


def _as_wide(mine: Tensor, others: Tensor, blank: float) -> tuple[Tensor, Tensor]:
    """Two tensors `[N, S, ...]` padded to the same S."""
    width = max(mine.shape[1], others.shape[1])

    def padded(value: Tensor) -> Tensor:
        missing = value.new_full((len(value), width - value.shape[1], *value.shape[2:]), blank)
        return torch.cat([value, missing], dim=1)

    return padded(mine), padded(others)


def valid_mask(canvas: Tensor, eos_token_ids: tuple[int, ...]) -> Tensor:
    """bool `[N, L]`: True up to and including the first token of the end-of-sequence set."""
    is_eos = torch.isin(canvas, torch.tensor(eos_token_ids, dtype=canvas.dtype, device=canvas.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0
