"""A replay: what happened to the slots of a few rows, step by step, as plain values.

Owns the way from a `Rollout` to the list of events that pages and terminals show. It draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.tracking.printable import printable

OPEN = -1
"""Stands for a token where a slot is not written."""

Mark = Literal["", "written", "remasked", "replaced", "inserted"]
"""What the step just made did to a slot."""

_DIGITS = 4  # of a probability


@dataclass(frozen=True)
class Event:
    """One thing that happened to a slot.

    Args:
        step: of the row, from 0. kind: what happened. position: canvas offset at that moment.
        token: its id; `OPEN` for an open slot that is put in or taken out and for a cut.
        probability: of a token that is written, under the model's untempered softmax.
        drawn: its probability under the distribution really drawn from; None at temperature 0.
        confidence: the schedule's, where the trace has one.
    """

    step: int
    kind: EventKind
    position: int
    token: int
    probability: float | None = None
    drawn: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Slot:
    """A slot of the canvas at some step.

    Args:
        token: its id, or `OPEN`. step: at which it was written; -1 if it was given or is open.
        probability: as in `Event`, of the token. mark: what the last step did to it.
    """

    token: int
    step: int = -1
    probability: float | None = None
    mark: Mark = ""


@dataclass(frozen=True)
class RowReplay:
    """How one row was written.

    Args:
        row: of the rollout. row_id: what keyed its randomness.
        prompt, completion: as text; the completion is the valid part.
        start: token ids of its slots before the first step, `OPEN` where nothing is given.
        events: in order.
        steps: that it took. nfe: its forwards. extra_forwards: of other models. stop_reason: as in `Rollout`.
        blocks: `(step, start, stop)`: from that step on the active block was `start..stop - 1`; empty if not recorded.
        notes: further things to be said about it, such as its reward.
    """

    row: int
    row_id: int
    prompt: str
    completion: str
    start: list[int]
    events: list[Event]
    steps: int
    nfe: int
    extra_forwards: int
    stop_reason: str
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def states(self) -> Iterator[list[Slot]]:
        """The canvas before the first step and after each of the `steps` steps."""
        slots = [Slot(token) for token in self.start]
        events = iter(self.events)
        upcoming = next(events, None)
        yield slots
        for step in range(self.steps):
            slots = [Slot(slot.token, slot.step, slot.probability) for slot in slots]
            while upcoming is not None and upcoming.step <= step:
                _apply(slots, upcoming)
                upcoming = next(events, None)
            yield slots

    def block(self, step: int) -> tuple[int, int] | None:
        """The block `(start, stop)` that was active when `step` steps had been made, if that was recorded."""
        active = None
        for first, start, stop in self.blocks:
            if active is None or first < step:
                active = (start, stop)
        return active


@dataclass(frozen=True)
class Replay:
    """Rows of one rollout.

    Args:
        rows: to be shown. texts: what to show for each token id that occurs.
        schedule, cache, exact, seed, weight_version: as in `Rollout`.
    """

    rows: list[RowReplay]
    texts: dict[int, str]
    schedule: str
    cache: str
    exact: bool
    seed: int
    weight_version: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the events of a row as one list per property."""
        return {
            "schedule": self.schedule,
            "cache": self.cache,
            "exact": self.exact,
            "seed": self.seed,
            "weight_version": self.weight_version,
            "texts": {str(token): text for token, text in self.texts.items()},
            "rows": [{**vars(row), "events": _columns(row.events)} for row in self.rows],
        }


class BlockLog:
    """Remembers which block of each row was active when; a callback for `RolloutEngine.generate(on_step=...)`."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[int, int, int]]] = {}

    def __call__(self, progress: Any) -> None:
        """Takes the engine's report on a step (`rl4dlm.rollout.rows.Progress`)."""
        columns = (progress.slots, progress.step, progress.start, progress.stop)
        for row, steps, start, stop in zip(*(column.tolist() for column in columns), strict=True):
            known = self.rows.setdefault(row, [])
            if not known or known[-1][1:] != (start, stop):
                known.append((steps - 1, start, stop))


def make_replay(
    rollout: Rollout,
    tokenizer: Any,
    *,
    rows: Sequence[int] | None = None,
    blocks: Mapping[int, list[tuple[int, int, int]]] | None = None,
    notes: Mapping[int, Mapping[str, str]] | None = None,
) -> Replay:
    """The replay of some rows of a rollout.

    Args:
        rollout: what the engine recorded. tokenizer: of the model.
        rows: which; None for all.
        blocks: by row, `BlockLog.rows`. notes: by row, further things to be said about it.

    Raises:
        ValueError: a row that the rollout does not have.
    """
    chosen = list(range(len(rollout)) if rows is None else rows)
    for row in chosen:
        if not 0 <= row < len(rollout):
            raise ValueError(f"rows has {row}, but the rollout has rows 0..{len(rollout) - 1}")
    starts = _starts(rollout, chosen)
    if rollout.trace.events is not None:
        events = _recorded(rollout, chosen)
    elif rollout.trace.refinement is not None:
        events = _changes(rollout, chosen, starts)
    else:
        events = [_commits(rollout, row) for row in chosen]
    written = rollout.completion_ids
    replays = [
        RowReplay(
            row=row,
            row_id=rollout.row_ids[row],
            prompt=printable(tokenizer.decode(rollout.prompt_ids[row])),
            completion=printable(tokenizer.decode(written[row])),
            start=start,
            events=happened,
            steps=int(rollout.trace.steps[row]),
            nfe=int(rollout.nfe[row]),
            extra_forwards=int(rollout.extra_forwards[row]),
            stop_reason=rollout.stop_reason[row],
            blocks=list((blocks or {}).get(row, ())),
            notes=dict((notes or {}).get(row, {})),
        )
        for row, start, happened in zip(chosen, starts, events, strict=True)
    ]
    used = {token for row in replays for token in (*row.start, *(event.token for event in row.events))}
    return Replay(
        rows=replays,
        texts=token_texts(tokenizer, sorted(used - {OPEN})),
        schedule=rollout.schedule,
        cache=rollout.cache,
        exact=rollout.exact,
        seed=rollout.seed,
        weight_version=rollout.weight_version,
    )


# --- text -------------------------------------------------------------------------------------------------------------


def token_texts(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """What to show for each id: its text with its spaces, or its name where the tokenizer gives it no text."""
    if not ids:
        return {}
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    shown = {}
    for token, name, text in zip(ids, names, texts, strict=True):
        # SentencePiece drops the space that a first word begins with.
        spaced = f" {text}" if name and name.startswith("\u2581") and text and text[0] != " " else text
        shown[token] = printable(spaced or name or f"<{token}>")
    return shown


# --- events -----------------------------------------------------------------------------------------------------------


def _apply(slots: list[Slot], event: Event) -> None:
    at = event.position
    if event.kind == EventKind.TRUNCATE:
        del slots[at:]
    elif event.kind == EventKind.DELETE:
        del slots[at]
    elif event.kind == EventKind.INSERT:
        slots.insert(at, Slot(event.token, mark="inserted"))
    elif event.kind == EventKind.REMASK:
        stood = slots[at].step < event.step  # rather than being written and taken back in one step
        slots[at] = Slot(OPEN, mark="remasked" if stood else "")
    else:
        mark: Mark = "replaced" if event.kind == EventKind.REPLACE else "written"
        slots[at] = Slot(event.token, event.step, event.probability, mark)


def _starts(rollout: Rollout, rows: list[int]) -> list[list[int]]:
    """Slots of each row before its first step."""
    trace = rollout.trace
    if trace.refinement is not None:
        return next(rollout.states(), rollout.canvas)[rows].tolist()  # where no canvas has begun, -1, which is OPEN
    # Where canvases change their length, nothing is given from the start; what a schedule gives is put in.
    given = rollout.hinted if trace.length is None else torch.zeros_like(rollout.hinted)
    slots = torch.where(given, rollout.canvas, OPEN)[rows].tolist()
    if trace.start_length is None:
        return slots
    return [row[:length] for row, length in zip(slots, trace.start_length[rows].tolist(), strict=True)]


def _commits(rollout: Rollout, row: int) -> list[Event]:
    """Events of a row whose slots are written once."""
    trace = rollout.trace
    steps = trace.commit_step[row]
    places = (steps >= 0).nonzero().squeeze(-1)
    places = places[steps[places].argsort(stable=True)]
    raw = _probabilities(trace.raw_log_prob[row][places])
    drawn = [None] * len(places) if trace.log_prob is None else _probabilities(trace.log_prob[row][places])
    written = zip(
        steps[places].tolist(), places.tolist(), rollout.canvas[row][places].tolist(), raw, drawn, strict=True
    )
    return [Event(step, EventKind.COMMIT, *rest) for step, *rest in written]


def _recorded(rollout: Rollout, rows: Sequence[int]) -> list[list[Event]]:
    """The rollout's own events of some rows."""
    found = rollout.trace.events
    assert found is not None
    by_row: dict[int, list[Event]] = {row: [] for row in rows}
    kept = torch.isin(found.row, torch.tensor(list(rows), dtype=found.row.dtype, device=found.row.device))
    columns = zip(
        *(column[kept].tolist() for column in (found.row, found.step, found.kind, found.position, found.token)),
        _probabilities(found.raw_log_prob[kept]),
        _probabilities(found.log_prob[kept]),
        [round(value, _DIGITS) for value in found.confidence[kept].tolist()],
        strict=True,
    )
    for row, step, code, position, token, raw, drawn, confidence in columns:
        kind = EventKind(code)
        numbers: tuple[float | None, ...] = ()
        if kind in (EventKind.COMMIT, EventKind.REPLACE):
            numbers = (raw, None if rollout.trace.log_prob is None else drawn, confidence)
        shown = OPEN if token == rollout.mask_token_id or token < 0 else token
        by_row[row].append(Event(step, kind, position, shown, *numbers))
    return [by_row[row] for row in rows]


def _changes(rollout: Rollout, rows: Sequence[int], starts: Sequence[list[int]]) -> list[list[Event]]:
    """Events of canvases that are refined: whatever differs between a state and the next."""
    found: list[list[Event]] = [[] for _ in rows]
    before = [list(start) for start in starts]
    states = [state[list(rows)].tolist() for state in rollout.states()][1:]
    last = rollout.trace.steps[list(rows)].tolist()
    final = rollout.canvas[list(rows)].tolist()
    for step, after in enumerate([*states, final]):
        for i, tokens in enumerate(after):
            if step >= last[i]:
                continue
            now = final[i] if step == last[i] - 1 else tokens
            for position, (old, new) in enumerate(zip(before[i], now, strict=True)):
                if old != new:
                    kind = EventKind.COMMIT if old == OPEN else EventKind.REPLACE
                    found[i].append(Event(step, kind, position, new))
            before[i] = now
    return found


def _probabilities(log_probs: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in log_probs.double().exp().tolist()]


def _columns(events: Sequence[Event]) -> dict[str, list[Any]]:
    """One list per property; those that no event has are left out."""
    names = ("step", "kind", "position", "token", "probability", "drawn", "confidence")
    columns = {name: [getattr(event, name) for event in events] for name in names}
    columns["kind"] = [int(event.kind) for event in events]
    return {n: column for n, column in columns.items() if n in names[:4] or any(v is not None for v in column)}
