"""The state of the rows that are alive: how they start, where each is, and what is left of them when they leave.

Owns admission, blocks and compaction. Changes of length are in `lengths.py`, what is fed to the model in `feed.py`,
what a step does with the answer in `step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import BLOCK_KINDS, block_starts, position_ids
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy
from rl4dlm.rollout.caches.store import KeyValueStore
from rl4dlm.rollout.constraints.automata import Constraint, reading_of
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import Reading
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.record import COMPLETE, EOS, KEPT, STOP, Record
from rl4dlm.rollout.requests import Requests
from rl4dlm.rollout.schedules.parts import BlockStart, Schedule
from rl4dlm.rollout.stopping import Stop, Stops

CANDIDATES = "candidates"

PER_ROW = (
    "tokens", "keys", "positions", "prompt_lengths", "offset", "masked", "locked", "choice", "row_ids", "slot",
    "length", "start", "stop", "reach", "block", "block_step", "total_step", "masked_at_start", "before", "refreshed",
    "stalled", "staying", "done", "reason", "nfe", "extra_forwards", "commit_step", "block_stop",
    *KEPT,
)  # fmt: skip
"""What is kept per row, first axis R."""

CUT = 16
"""Columns of padding that all rows have in common before they are cut off."""


@dataclass(frozen=True)
class Progress:
    """The rows still alive, after a step.

    Args:
        slots: long `[r]`, which rows of the call they are. canvas: long `[r, W]`. masked: bool `[r, W]`.
        length: long `[r]`, slots of each row; what lies behind does not exist.
        step: long `[r]`, steps made. start, stop: long `[r]`, the block that was active.
        reach: long `[r]`, the slot behind the last one that could be written.
        commit_step: long `[r, W]`. raw_log_prob: `[r, W]`. Both as in `Trace`, so far.
    """

    slots: Tensor
    canvas: Tensor
    masked: Tensor
    length: Tensor
    step: Tensor
    start: Tensor
    stop: Tensor
    reach: Tensor
    commit_step: Tensor
    raw_log_prob: Tensor


@dataclass(frozen=True)
class Choices:
    """Which tokens may be drawn where.

    Args:
        sets: bool `[S, V]`, sets of tokens. index: long `[N, L]`, which set binds a slot; -1 for none.
    """

    sets: Tensor
    index: Tensor


def step_cap(config: DecodingConfig, schedule: Schedule) -> int:
    """Steps that a row may make; after that it writes all it may at every step."""
    return 4 * config.canvas_length + schedule.patience * config.num_blocks + (config.steps or 0)


def most_steps(config: DecodingConfig, schedule: Schedule) -> int:
    """More steps than any row can make, guesses of further ones included; and more than it has slots."""
    return step_cap(config, schedule) + config.num_blocks + config.draft_steps + config.canvas_length


class Rows:
    """Rows that are decoded together, and a queue of those that wait for a place.

    The state below is that of the rows still alive, in any order; `slot` says which rows of the call they are.
    """

    tokens: Tensor  # long [R, T]
    keys: Tensor  # bool [R, T]
    positions: Tensor  # long [R, T]
    prompt_lengths: Tensor  # long [R]
    offset: Tensor  # long [R], prompt tokens in the first block that is written
    masked: Tensor  # bool [R, W]
    locked: Tensor  # bool [R, W]
    choice: Tensor  # long [R, W], see `Choices`
    row_ids: Tensor
    slot: Tensor
    length: Tensor
    start: Tensor  # canvas offsets of the active block
    stop: Tensor
    reach: Tensor  # canvas offset behind the last slot that a step may write
    block: Tensor
    block_step: Tensor
    total_step: Tensor
    masked_at_start: Tensor
    before: Tensor  # column at which the block started that was active at the step before; -1: there was none
    refreshed: Tensor  # block in which everything was last fed; -1: none
    stalled: Tensor
    staying: Tensor
    done: Tensor
    reason: Tensor
    nfe: Tensor
    extra_forwards: Tensor
    commit_step: Tensor
    block_stop: Tensor
    raw_log_prob: Tensor
    log_prob: Tensor
    confidence: Tensor
    entropy: Tensor

    def __init__(
        self,
        model: Any,
        spec: DiffusionSpec,
        prompts: list[list[int]],
        row_ids: list[int],
        record: Record,
        config: DecodingConfig,
        schedule: Schedule,
        cache: CachePolicy,
        noise: NoiseSource,
        choices: Choices | None = None,
        constraint: Constraint | None = None,
        on_step: Callable[[Progress], None] | None = None,
        capacity: int | None = None,
        in_step: Callable[[bool], bool] | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.model, self.spec = model, spec
        self.record, self.config, self.schedule, self.cache, self.noise = record, config, schedule, cache, noise
        self.choices, self.constraint, self.on_step, self.in_step = choices, constraint, on_step, in_step
        self.stops = None if stop is None else Stops(stop, spec.eos_token_ids)
        self.all_prompts, self.all_row_ids = prompts, row_ids
        begun = record.hinted | (record.commit_step >= 0)
        self.given = begun.any(-1).tolist()  # rows of the call that begin with more than their prompt
        self.begun = int(record.steps.max()) if len(prompts) else 0  # steps that some had made before
        self.counts = False  # whether steps are asked how many slots they settle
        self._ranges: dict[int, Tensor] = {}
        self._looked_up: list[tuple[Tensor, Tensor, Tensor]] = []
        self.capacity = max(1, len(prompts)) if capacity is None else capacity
        self.waiting = list(range(len(prompts)))
        if self.capacity < len(prompts):  # the longest first, so that those who come later fit
            self.waiting.sort(key=lambda row: -len(prompts[row]))
        self.step_cap = step_cap(config, schedule)
        self.guided = config.cfg_scale > 0
        self.requests = Requests(config.record, config.record_steps, config.num_fillings)
        self.reads: dict[str, Reading] = {**schedule.reads, **self.requests.readings}
        if constraint is not None:
            self.reads[CANDIDATES] = reading_of(constraint)
        self.record.start_length[:] = schedule.start_length or config.canvas_length
        self._begin()

    def _begin(self) -> None:
        """Rows take their places: as many as there are places, and nothing is left of those before."""
        rows, self.waiting = self.waiting[: self.capacity], self.waiting[self.capacity :]
        self.prompts = [self.all_prompts[row] for row in rows]
        self.blank = [not self.given[row] for row in rows]  # whether a row is its prompt and nothing else
        self.width = max(map(len, self.prompts), default=0)  # columns of the left-padded prompt
        for name, value in self._fresh(rows).items():
            setattr(self, name, value)
        self.padded = not bool(self.keys.all())
        self.memory, self.cache_memory = Memory(), Memory()
        self.steps_made = self.begun
        self.fed = torch.full_like(self.tokens, -1) if self.cache.tracks else None
        self.store: KeyValueStore | None = None
        if self.cache.uses_store:
            layers = self.model.config.get_text_config().num_hidden_layers
            self.store = KeyValueStore(layers, len(rows) * (1 + self.guided), self.tokens.shape[1])

    def _fresh(self, rows: list[int]) -> dict[str, Tensor]:
        """The state of rows of the call at their start, by name; their prompts fit into `width` columns."""
        device, count = self.record.canvas.device, len(rows)
        length = self.schedule.start_length or self.config.canvas_length
        prompts = torch.zeros(count, self.width, dtype=torch.long)
        real = torch.ones(count, self.width + length, dtype=torch.bool)
        for i, row in enumerate(rows):
            prompt = self.all_prompts[row]
            prompts[i, self.width - len(prompt) :] = torch.tensor(prompt)
            real[i, : self.width - len(prompt)] = False
        slot, keys = torch.tensor(rows, dtype=torch.long, device=device), real.to(device)
        locked, commit_step = self.record.hinted[slot, :length], self.record.commit_step[slot, :length]
        written, steps = locked | (commit_step >= 0), self.record.steps[slot]
        canvas = torch.where(written, self.record.canvas[slot, :length], self.spec.mask_token_id)
        prompt_lengths = keys[:, : self.width].sum(-1)
        offset = torch.zeros_like(prompt_lengths)
        if self.spec.attention in BLOCK_KINDS:
            first = block_starts(self.spec, prompt_lengths[:, None], prompt_lengths)
            offset = prompt_lengths - first.squeeze(-1)

        def numbers(value: int = 0) -> Tensor:
            return torch.full((count,), value, device=device)

        def flags() -> Tensor:
            return torch.zeros(count, dtype=torch.bool, device=device)

        def slots(value: int = -1) -> Tensor:
            return torch.full((count, length), value, device=device)

        return {
            "tokens": torch.cat([prompts.to(device), canvas], dim=1),
            "keys": keys,
            "positions": position_ids(keys),
            "prompt_lengths": prompt_lengths,
            "offset": offset,
            "masked": ~written,
            "locked": locked,
            "choice": slots() if self.choices is None else self.choices.index[slot],
            "row_ids": torch.tensor([self.all_row_ids[row] for row in rows], dtype=torch.long, device=device),
            "slot": slot,
            "length": numbers(length),
            "start": numbers(),
            "stop": numbers(),
            "reach": numbers(),
            "block": numbers(-1),
            "block_step": numbers(),
            "total_step": steps,
            "masked_at_start": numbers(),
            "before": numbers(-1),
            "refreshed": numbers(-1),
            "stalled": steps - 1 - commit_step.amax(-1),  # 0 where nothing happened yet
            "staying": flags(),
            "done": flags(),
            "reason": numbers(COMPLETE),
            "nfe": self.record.nfe[slot],
            "extra_forwards": self.record.extra_forwards[slot],
            "commit_step": commit_step,
            **{name: getattr(self.record, name)[slot, :length] for name in ("block_stop", *KEPT)},
        }

    @property
    def offsets(self) -> Tensor:
        """long `[W]`, canvas offsets."""
        return self._range(self.masked.shape[1])

    def _range(self, count: int) -> Tensor:
        """long `[count]`, from 0; kept."""
        if count not in self._ranges:
            self._ranges[count] = torch.arange(count, device=self.slot.device)
        return self._ranges[count]

    @property
    def open(self) -> Tensor:
        """bool `[R, W]`, masked slots up to the end of the active block."""
        return self._masked_before(self.stop)

    @property
    def eligible(self) -> Tensor:
        """bool `[R, W]`, masked slots that a step may write."""
        return self._masked_before(self.reach)

    def _masked_before(self, limit: Tensor) -> Tensor:
        """bool `[R, W]`; looked up several times in a step, so the last ones are kept. Nothing changes in place."""
        for masked, before, found in self._looked_up:
            if masked is self.masked and before is limit:
                return found
        found = self.masked & (self.offsets < limit[:, None])
        self._looked_up = [(self.masked, limit, found), *self._looked_up[:1]]
        return found

    def _is_end(self, tokens: Tensor) -> Tensor:
        """bool of the shape of `tokens`: which are end-of-sequence tokens."""
        if len(self.spec.eos_token_ids) == 1:
            return tokens == self.spec.eos_token_ids[0]
        return torch.isin(tokens, torch.tensor(self.spec.eos_token_ids, dtype=tokens.dtype, device=tokens.device))

    def _finished(self) -> Tensor:
        """bool `[R]`: every slot is written, or every slot up to the first end-of-sequence token is."""
        finished = ~self.masked.any(-1)
        if self.schedule.stay is not None:
            finished = finished & ~self.staying
        if self.schedule.finish is not None or self.constraint is not None:
            finished = finished | self.done
        if self.config.stop_at_eos and not self.schedule.reopens:
            settled = self.masked.cumsum(-1) == 0
            if self.schedule.resize is not None:
                settled = settled & (self.offsets < self.length[:, None])
            ended = (self._is_end(self.tokens[:, self.width :]) & settled).any(-1)
            if self.config.stop_at_eos == "block" or not self.schedule.monotone:
                ended = ended & self._final()
            finished = finished | ended
        if self.stops is not None and not self.schedule.reopens:
            finished = finished | ((self._stop_places() >= 0) & (self._final() | self.schedule.monotone))
        return finished

    def _final(self) -> Tensor:
        """bool `[R]`: the block is complete; until then its tokens may still change."""
        return ~(self.open | self.eligible).any(-1) & ~self.staying

    def _stop_places(self) -> Tensor:
        assert self.stops is not None
        return self.stops.places(self.tokens[:, self.width :], self.masked, self.length)

    def _retire(self, finished: Tensor) -> None:
        """Records finished rows; others take their places."""
        slots, masked, width = self.slot[finished], self.masked[finished], self.masked.shape[1]
        unwritten = next(iter(self.spec.eos_token_ids), self.spec.mask_token_id)  # without an end, no row stops early
        length, reason = self.length[finished], self.reason[finished]
        if self.stops is not None:
            place = self._stop_places()[finished]
            reason = torch.where(place >= 0, STOP, reason)
            masked = masked | ((place >= 0)[:, None] & (self.offsets >= place[:, None]))
        canvas = torch.where(masked, unwritten, self.tokens[finished, self.width :])
        record = self.record
        record.canvas[slots] = unwritten
        record.canvas[slots, :width] = torch.where(self.offsets < length[:, None], canvas, unwritten)
        record.hinted[slots] = False
        record.hinted[slots, :width] = self.locked[finished] & ~masked
        for name in ("commit_step", "block_stop", *KEPT):
            value = getattr(self, name)[finished]
            if self.stops is not None:  # what is cut off counts as never drawn
                value = value.masked_fill(masked, 0.0 if name in KEPT else -1)
            getattr(record, name)[slots, :width] = value
        early = masked.any(-1) | (length < record.start_length[slots])
        record.reason[slots] = torch.where((reason == COMPLETE) & early, EOS, reason)
        record.steps[slots] = self.total_step[finished]
        record.nfe[slots], record.extra_forwards[slots] = self.nfe[finished], self.extra_forwards[finished]
        record.length[slots] = length
        self._fill(finished.nonzero().squeeze(-1))

    @property
    def _refills(self) -> bool:
        """Whether a row may begin beside rows that are under way: it has no past, and a canvas of their length."""
        remembered = (self.memory, self.cache_memory)
        return self.schedule.resize is None and not any(memory.rows or memory.slots for memory in remembered)

    def _fill(self, free: Tensor) -> None:
        """Waiting rows take free places, long `[f]`; what is free after that is closed, with rows from behind."""
        rows: list[int] = []
        if self.waiting and self._refills:
            rows, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        if rows:
            taken, free = free[: len(rows)], free[len(rows) :]
            for name, value in self._fresh(rows).items():
                setattr(self, name, getattr(self, name).index_copy(0, taken, value))
            for place, row in zip(taken.tolist(), rows, strict=True):
                self.prompts[place], self.blank[place] = self.all_prompts[row], not self.given[row]
            if self.fed is not None:
                self.fed = self.fed.index_fill(0, taken, -1)
        if len(free):
            self._close(free)
        if rows:
            self._cut()
        if not len(self.slot) and self.waiting:
            self._begin()

    def _close(self, free: Tensor) -> None:
        """Closes the places of rows that have left: the last rows move into them, the others stay where they are."""
        left = len(self.slot) - len(free)
        keep = torch.arange(len(self.slot), device=free.device)
        alive = torch.ones_like(keep, dtype=torch.bool).index_fill(0, free, False)
        keep[free[free < left]] = keep[left:][alive[left:]]
        keep = keep[:left]
        if self.store is not None:
            self.store.compact(torch.cat([keep, keep + len(self.slot)]) if self.guided else keep)
        self._take(keep)

    def _take(self, keep: Tensor) -> None:
        """The rows of these indices, long `[r]`, in this order; all but the store."""
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[keep])
        if self.fed is not None:
            self.fed = self.fed[keep]
        kept = keep.tolist()
        self.prompts, self.blank = [self.prompts[row] for row in kept], [self.blank[row] for row in kept]
        self.memory.keep(keep)
        self.cache_memory.keep(keep)

    def _cut(self) -> None:
        """Cuts off columns that are padding in every row."""
        count = self.width - max(map(len, self.prompts), default=self.width)
        if count >= CUT:
            self.width -= count
            for name in ("tokens", "keys", "positions"):
                setattr(self, name, getattr(self, name)[:, count:])
            if self.fed is not None:
                self.fed = self.fed[:, count:]
            if self.store is not None:
                self.store.cut(count)
            self.before = torch.where(self.before < 0, self.before, self.before - count)
        self.padded = not bool(self.keys.all())

    def _leaving(self) -> Tensor:
        """bool `[R]`, rows that have nothing to write in their block and do not stay there."""
        leaving = ~self.open.any(-1)
        return leaving if self.schedule.stay is None else leaving & ~self.staying

    def _enter_blocks(self, moved: Tensor) -> None:
        """Moves rows on to their next block; it may have no masked slots."""
        self.start = torch.where(moved & (self.block >= 0), self.stop, self.start)
        self.block = self.block + moved.long()
        self.block_step = torch.where(moved, self._steps_in_block(), self.block_step)
        self.stop = torch.where(moved, self._block_end(), self.stop)

    def _steps_in_block(self) -> Tensor | int:
        """Steps that rows have made in the block that they enter; some only where they had begun it before this call.

        A block is entered with the step after that of the last token before it.
        """
        if not self.begun:
            return 0
        before = self.commit_step.masked_fill(self.offsets >= self.start[:, None], -1)
        return self.total_step - 1 - before.amax(-1)

    def _masked_at_start(self) -> Tensor:
        """long `[R]`, masked slots of the block when it was entered; what is there for rows under way stays."""
        if not self.begun:
            return torch.where(self.block_step == 0, self.open.sum(-1), self.masked_at_start)
        since = (self.total_step - self.block_step)[:, None]
        return ((self.masked | (self.commit_step >= since)) & (self.offsets < self.stop[:, None])).sum(-1)

    def _block_end(self) -> Tensor:
        rows = BlockStart(self.start, self.block, self.offset, self.length, self.masked, self.memory)
        end = self.schedule.blocks.end(rows)
        if self.begun and not self.schedule.blocks.on_grid:  # a block that was begun ends where it was decided to
            known = (self.offsets >= self.start[:, None]) & (self.block_stop > self.start[:, None])
            decided = torch.where(known, self.block_stop, self.masked.shape[1] + 1).amin(-1)
            end = torch.where(decided <= self.length, decided, end)
        return torch.minimum(end, self.length)

    def _progress(self) -> Progress:
        return Progress(
            slots=self.slot + self.record.first,
            canvas=self.tokens[:, self.width :].clone(),
            masked=self.masked.clone(),
            length=self.length,
            step=self.total_step,
            start=self.start,
            stop=self.stop,
            reach=self.reach,
            commit_step=self.commit_step,
            raw_log_prob=self.raw_log_prob,
        )
