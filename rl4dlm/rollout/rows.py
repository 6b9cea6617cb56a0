"""The state of the rows that are alive: how they start, where each is, and what is left of them when they leave.

Owns admission, blocks, changes of length and compaction. What is fed to the model is in `feed.py`, what a step does
with the answer in `step.py`.
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
from rl4dlm.rollout.memory import Memory, moved
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.record import COMPLETE, EOS, KEPT, Record
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.rollout.schedules.parts import BlockStart, Resize, Schedule

CANDIDATES = "candidates"

PER_ROW = (
    "tokens", "keys", "positions", "prompt_lengths", "offset", "masked", "locked", "choice", "row_ids", "slot",
    "length", "start", "stop", "block", "block_step", "total_step", "masked_at_start", "unsettled", "stalled",
    "staying", "done", "reason", "commit_step", "block_stop", *KEPT,
)  # fmt: skip
"""What is kept per row, first axis R."""


@dataclass(frozen=True)
class Progress:
    """The rows still alive, after a step.

    Args:
        slots: long `[r]`, which rows of the call they are. canvas: long `[r, W]`. masked: bool `[r, W]`.
        length: long `[r]`, slots of each row; what lies behind does not exist.
        step: long `[r]`, steps made. start, stop: long `[r]`, the block that was active.
        commit_step: long `[r, W]`. raw_log_prob: `[r, W]`. Both as in `Trace`, so far.
    """

    slots: Tensor
    canvas: Tensor
    masked: Tensor
    length: Tensor
    step: Tensor
    start: Tensor
    stop: Tensor
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


class Rows:
    """Rows that are decoded together. The state below is that of the rows still alive; `slot` says which they are."""

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
    ) -> None:
        self.model, self.spec, self.prompts = model, spec, prompts
        self.record, self.config, self.schedule, self.cache, self.noise = record, config, schedule, cache, noise
        self.choices, self.constraint, self.on_step = choices, constraint, on_step
        device, rows = record.canvas.device, len(prompts)
        length = schedule.start_length or config.canvas_length
        self.width = max((len(p) for p in prompts), default=0)  # columns of the left-padded prompt
        self.tokens = torch.full((rows, self.width + length), self.spec.mask_token_id, device=device)  # [R, T]
        self.keys = torch.ones_like(self.tokens, dtype=torch.bool)  # [R, T]
        for row, prompt in enumerate(prompts):
            padding = self.width - len(prompt)
            self.tokens[row, :padding], self.keys[row, :padding] = 0, False
            self.tokens[row, padding : self.width] = torch.tensor(prompt, device=device)
        self.locked = record.hinted[:, :length].clone()  # [R, W]
        self.masked = ~self.locked  # [R, W]
        self.tokens[:, self.width :] = torch.where(self.masked, self.spec.mask_token_id, record.canvas[:, :length])
        self.positions = position_ids(self.keys)  # [R, T]
        self.prompt_lengths = self.keys[:, : self.width].sum(-1)  # [R]
        self.offset = torch.zeros_like(self.prompt_lengths)  # prompt tokens in the first block that is written
        if spec.attention in BLOCK_KINDS:
            first = block_starts(spec, self.prompt_lengths[:, None], self.prompt_lengths)
            self.offset = self.prompt_lengths - first.squeeze(-1)
        self.row_ids = torch.tensor(row_ids, dtype=torch.long, device=device)
        self.slot = torch.arange(rows, device=device)
        self.choice = torch.full((rows, length), -1, device=device) if choices is None else choices.index
        self.length = torch.full((rows,), length, device=device)
        self.start, self.stop, self.block = (torch.full((rows,), v, device=device) for v in (0, 0, -1))
        self.block_step, self.total_step, self.masked_at_start, self.stalled, self.reason = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(5)
        )
        self.staying, self.done = (torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(2))
        self.unsettled = torch.full((rows,), -1, device=device)  # first column whose stored keys may still change
        self.commit_step = torch.full((rows, length), -1, device=device)
        self.block_stop = torch.full((rows, length), -1, device=device)
        self.raw_log_prob, self.log_prob, self.confidence, self.entropy = (
            torch.zeros(rows, length, dtype=record.raw_log_prob.dtype, device=device) for _ in KEPT
        )
        self.memory = Memory()
        self.record.start_length[:] = length
        self.step_cap = 4 * config.canvas_length + schedule.patience * config.num_blocks + (config.steps or 0)
        self.guided = config.cfg_scale > 0
        self.reads: dict[str, Reading] = dict(schedule.reads)
        if constraint is not None:
            self.reads[CANDIDATES] = reading_of(constraint)
        self.store: KeyValueStore | None = None
        if cache.uses_store:
            layers = self.model.config.get_text_config().num_hidden_layers
            self.store = KeyValueStore(layers, rows * (1 + self.guided), self.tokens.shape[1])

    @property
    def offsets(self) -> Tensor:
        """long `[W]`, canvas offsets."""
        return torch.arange(self.masked.shape[1], device=self.masked.device)

    @property
    def open(self) -> Tensor:
        """bool `[R, W]`, masked slots up to the end of the active block."""
        return self.masked & (self.offsets < self.stop[:, None])

    def _finished(self) -> Tensor:
        """bool `[R]`: every slot is written, or every slot up to the first end-of-sequence token is."""
        finished = (~self.masked.any(-1) & ~self.staying) | self.done
        if self.config.stop_at_eos and not self.schedule.reopens:
            canvas = self.tokens[:, self.width :]
            ends = torch.tensor(self.spec.eos_token_ids, dtype=canvas.dtype, device=canvas.device)
            exists = self.offsets < self.length[:, None]
            settled = exists & ~self.masked & (self.masked.cumsum(-1) == 0)
            ended = (torch.isin(canvas, ends) & settled).any(-1)
            if self.config.stop_at_eos == "block" or not self.schedule.monotone:
                ended &= ~self.open.any(-1) & ~self.staying  # until then its tokens may still change
            finished |= ended
        return finished

    def _retire(self, finished: Tensor) -> None:
        """Records finished rows and removes them from the batch."""
        if not bool(finished.any()):
            return
        slots, masked, width = self.slot[finished], self.masked[finished], self.masked.shape[1]
        unwritten = next(iter(self.spec.eos_token_ids), self.spec.mask_token_id)  # without an end, no row stops early
        length = self.length[finished]
        canvas = torch.where(masked, unwritten, self.tokens[finished, self.width :])
        record = self.record
        record.canvas[slots] = unwritten
        record.canvas[slots, :width] = torch.where(self.offsets < length[:, None], canvas, unwritten)
        record.hinted[slots] = False
        record.hinted[slots, :width] = self.locked[finished]
        for name in ("commit_step", "block_stop", *KEPT):
            getattr(record, name)[slots, :width] = getattr(self, name)[finished]
        reason = self.reason[finished]
        early = masked.any(-1) | (length < record.start_length[slots])
        record.reason[slots] = torch.where((reason == COMPLETE) & early, EOS, reason)
        record.steps[slots] = self.total_step[finished]
        record.length[slots] = length
        keep = (~finished).nonzero().squeeze(-1)
        if self.store is not None:
            self.store.compact(torch.cat([keep, keep + len(self.slot)]) if self.guided else keep)
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[keep])
        self.prompts = [self.prompts[row] for row in keep.tolist()]
        self.memory.keep(keep)

    def _enter_blocks(self) -> None:
        """Moves each row on to its first block with masked slots."""
        moved = ~self.open.any(-1) & ~self.staying
        while bool(moved.any()):
            self.start = torch.where(moved & (self.block >= 0), self.stop, self.start)
            self.block = self.block + moved.long()
            self.block_step = torch.where(moved, 0, self.block_step)
            self.stop = torch.where(moved, self._block_end(), self.stop)
            moved = ~self.open.any(-1) & ~self.staying
        self.masked_at_start = torch.where(self.block_step == 0, self.open.sum(-1), self.masked_at_start)

    def _block_end(self) -> Tensor:
        rows = BlockStart(self.start, self.block, self.offset, self.length, self.masked, self.memory)
        return torch.minimum(self.schedule.blocks.end(rows), self.length)

    def _resize(self, change: Resize, total_step: Tensor, capped: Tensor) -> None:
        at, count = change.at, torch.where(capped, 0, change.count.clamp(min=0))
        grown = self.length + count
        length = torch.minimum(torch.minimum(grown, change.limit), grown.new_tensor(self.config.canvas_length))
        length = torch.where(capped, self.length, length)
        if bool((length == self.length).all()) and not bool(count.any()):
            return
        slots = torch.arange(int(length.max()), device=at.device)
        inserted = (slots >= at[:, None]) & (slots < (at + count)[:, None]) & (slots < length[:, None])
        source = torch.where(slots < at[:, None], slots, slots - count[:, None])
        source = source.masked_fill(inserted | (slots >= length[:, None]), -1)
        self._log_resize(at, count, change.token, grown, length, total_step)
        given = change.token != self.spec.mask_token_id
        canvas = torch.where(inserted, change.token[:, None], moved(self.tokens[:, self.width :], source, 0))
        self.masked = moved(self.masked, source, False) | (inserted & ~given[:, None])
        self.locked = moved(self.locked, source, False) | (inserted & given[:, None])
        self.choice = moved(self.choice, source, -1)
        self.commit_step = moved(self.commit_step, source, -1)
        self.block_stop = moved(self.block_stop, source, -1)
        for name in KEPT:
            setattr(self, name, moved(getattr(self, name), source, 0.0))
        self.memory.move(source)
        self.tokens = torch.cat([self.tokens[:, : self.width], canvas], dim=1)
        self.keys = torch.cat([self.keys[:, : self.width], slots < length[:, None]], dim=1)
        self.positions = position_ids(self.keys)
        self.length = length
        self.start = torch.minimum(self.start + torch.where(at < self.start, count, 0), length)
        self.stop = self._block_end()

    def _log_resize(
        self, at: Tensor, count: Tensor, token: Tensor, grown: Tensor, length: Tensor, total_step: Tensor
    ) -> None:
        log, slots = self.record.log, self.slot + self.record.first
        rows = torch.repeat_interleave(torch.arange(len(at), device=at.device), count)
        if len(rows):
            log.add(EventKind.INSERT, slots[rows], total_step[rows], at[rows], token[rows])
        rows = (grown > length).nonzero().squeeze(-1)
        if len(rows):
            log.add(EventKind.TRUNCATE, slots[rows], total_step[rows], length[rows], torch.full_like(rows, -1))

    def _progress(self) -> Progress:
        return Progress(
            slots=self.slot + self.record.first,
            canvas=self.tokens[:, self.width :].clone(),
            masked=self.masked.clone(),
            length=self.length,
            step=self.total_step,
            start=self.start,
            stop=self.stop,
            commit_step=self.commit_step,
            raw_log_prob=self.raw_log_prob,
        )
