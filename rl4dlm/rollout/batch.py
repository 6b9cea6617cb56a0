"""The loop that decodes a batch of rows.

Owns which rows are alive, in which block each is, what is fed to the model and what is recorded. What is written when
is decided by the schedule, from where a row is fed by the cache policy, who sees whom by the model's attention kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import (
    BLOCK_KINDS,
    LEFT_TO_RIGHT,
    NOWHERE,
    Sight,
    attention_mask,
    block_starts,
    one_copy,
    position_ids,
)
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy
from rl4dlm.rollout.caches.store import KeyValueStore
from rl4dlm.rollout.constraints.automata import Constraint, candidates, constrain
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import Drawn, Places, Reading, Scored
from rl4dlm.rollout.memory import Memory, moved
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.record import COMPLETE, DEAD_END, EOS, STEP_CAP, Record
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.rollout.schedules.parts import BlockStart, CanvasInput, Resize, Schedule, Step, top

SHADOW, CANDIDATES = "shadow", "candidates"

_ROWS = (
    "tokens", "keys", "positions", "prompt_lengths", "offset", "masked", "locked", "choice", "row_ids", "slot",
    "length", "start", "stop", "block", "block_step", "total_step", "masked_at_start", "unsettled", "stalled",
    "staying", "done", "reason", "commit_step", "raw_log_prob", "log_prob",
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


class Batch:
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
        self.raw_log_prob, self.log_prob = (
            torch.zeros(rows, length, dtype=record.raw_log_prob.dtype, device=device) for _ in range(2)
        )
        self.memory = Memory()
        self.record.start_length[:] = length
        self.step_cap = 4 * config.canvas_length + schedule.patience * config.num_blocks + (config.steps or 0)
        self.guided = config.cfg_scale > 0
        self.reads: dict[str, Reading] = dict(schedule.reads)
        if constraint is not None:
            self.reads[CANDIDATES] = candidates
        self.store: KeyValueStore | None = None
        if cache.uses_store:
            layers = self.model.config.get_text_config().num_hidden_layers
            self.store = KeyValueStore(layers, rows * (1 + self.guided), self.tokens.shape[1])

    def decode(self) -> Iterator[int]:
        """Runs until every row is finished; yields how many slots each step settled."""
        self._retire(self._finished())
        while len(self.slot):
            before = int(self.masked.sum())
            self._enter_blocks()
            self._step()
            if self.on_step is not None:
                self.on_step(self._progress())
            self._retire(self._finished())
            yield max(0, before - int(self.masked.sum()))

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

    @property
    def offsets(self) -> Tensor:
        """long `[W]`, canvas offsets."""
        return torch.arange(self.masked.shape[1], device=self.masked.device)

    @property
    def open(self) -> Tensor:
        """bool `[R, W]`, masked slots up to the end of the active block."""
        return self.masked & (self.offsets < self.stop[:, None])

    # --- rows -------------------------------------------------------------------------------------------------------

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
        for name in ("commit_step", "raw_log_prob", "log_prob"):
            getattr(record, name)[slots, :width] = getattr(self, name)[finished]
        reason = self.reason[finished]
        early = masked.any(-1) | (length < record.start_length[slots])
        record.reason[slots] = torch.where((reason == COMPLETE) & early, EOS, reason)
        record.steps[slots] = self.total_step[finished]
        record.length[slots] = length
        keep = (~finished).nonzero().squeeze(-1)
        if self.store is not None:
            self.store.compact(torch.cat([keep, keep + len(self.slot)]) if self.guided else keep)
        for name in _ROWS:
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

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        schedule = self.schedule
        step = self._look()
        stop = schedule.blocks.settle(step)
        if stop is not None:
            self.stop = torch.where(self.block_step == 0, torch.minimum(stop, self.length), self.stop)
            self.masked_at_start = torch.where(self.block_step == 0, self.open.sum(-1), self.masked_at_start)
            step.stop, step.eligible, step.masked_at_start = self.stop, self.open, self.masked_at_start
        if schedule.propose is not None:
            step.drawn = schedule.propose(step)
        scores = schedule.confidence(step)
        if self.config.defer_token_ids:
            deferred = torch.isin(step.drawn.token, torch.tensor(self.config.defer_token_ids, device=scores.device))
            scores = scores.masked_fill(deferred, -torch.inf)
        capped = self.total_step >= self.step_cap
        self.reason = torch.where(capped, STEP_CAP, self.reason)
        commit = (schedule.commit(step, scores) | capped[:, None]) & step.eligible
        commit = self._admissible(step, scores, commit)
        none = torch.zeros_like(commit)
        changeable = step.seen & step.written & ~self.locked & ~capped[:, None]
        replace = none if schedule.replace is None else schedule.replace(step, commit) & changeable
        remask = none if schedule.remask is None else schedule.remask(step, commit)
        remask = remask & (step.written | commit) & ~self.locked & ~replace & ~capped[:, None]
        gained = commit.sum(-1) > remask.sum(-1)
        can_gain = step.eligible.any(-1)
        self.stalled = torch.where(gained | ~can_gain, 0, self.stalled + 1)
        forced = self.stalled > schedule.patience
        self.stalled = torch.where(forced, 0, self.stalled)
        remask &= ~forced[:, None]
        best = top(scores, step.eligible, torch.ones_like(self.block))
        commit |= self._admissible(step, scores, best & (forced & ~commit.any(-1))[:, None])
        self._write(step, commit, replace, remask)
        self._after(step, capped)

    def _admissible(self, step: Step, scores: Tensor, commit: Tensor) -> Tensor:
        """What the constraint lets pass of the slots to be written; changes `step.drawn` to what is written there."""
        if self.constraint is None:
            return commit
        commit, step.drawn, dead = constrain(step, scores, commit, self.constraint)
        self.reason, self.done = torch.where(dead, DEAD_END, self.reason), self.done | dead
        return commit

    def _write(self, step: Step, commit: Tensor, replace: Tensor, remask: Tensor) -> None:
        """Records and applies what happens to slots in this step."""
        if not self.schedule.monotone:
            self._log(EventKind.COMMIT, commit, step, step.drawn.token)
            self._log(EventKind.REPLACE, replace, step, step.drawn.token)
            self._log(EventKind.REMASK, remask, step, torch.where(commit, step.drawn.token, step.tokens))
        new = commit | replace
        canvas = torch.where(new, step.drawn.token, step.tokens)
        self.tokens[:, self.width :] = torch.where(remask, self.spec.mask_token_id, canvas)
        self.masked = (self.masked & ~commit) | remask
        kept, lost = new & ~remask, remask
        dtype = self.raw_log_prob.dtype
        self.commit_step = torch.where(kept, self.total_step[:, None], self.commit_step).masked_fill(lost, -1)
        for name in ("raw_log_prob", "log_prob"):
            drawn = getattr(step.drawn, name).to(dtype)
            setattr(self, name, torch.where(kept, drawn, getattr(self, name)).masked_fill(lost, 0.0))
        slots = self.slot + self.record.first
        if self.schedule.draws_positions:
            self.record.log.selections.append((slots, self.total_step, step.selection_log_prob))
        self.record.extra_forwards[self.slot] += step.extra_forwards
        self.block_step = self.block_step + 1
        self.total_step = self.total_step + 1

    def _log(self, kind: EventKind, where: Tensor, step: Step, tokens: Tensor) -> None:
        rows, columns = where.nonzero(as_tuple=True)
        if not len(rows):
            return
        numbers: dict[str, Tensor] = {}
        if kind != EventKind.REMASK:
            names = ("raw_log_prob", "log_prob", "confidence")
            numbers = {name: getattr(step.drawn, name)[rows, columns].double() for name in names}
        slots = self.slot[rows] + self.record.first
        self.record.log.add(kind, slots, step.total_step[rows], columns, tokens[rows, columns], **numbers)

    def _after(self, step: Step, capped: Tensor) -> None:
        """Changes of length, and whether rows stay in their block or are finished."""
        schedule = self.schedule
        if schedule.resize is None and schedule.stay is None and schedule.finish is None:
            return
        step = dataclasses.replace(step, tokens=self.tokens[:, self.width :], masked=self.masked)
        if schedule.stay is not None:
            self.staying = schedule.stay(step) & ~self.open.any(-1) & ~capped
        if schedule.finish is not None:
            self.done = self.done | schedule.finish(step)
        change = None if schedule.resize is None else schedule.resize(step)
        if change is not None:
            self._resize(change, step.total_step, capped)

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
        self.raw_log_prob, self.log_prob = (moved(v, source, 0.0) for v in (self.raw_log_prob, self.log_prob))
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

    # --- the model --------------------------------------------------------------------------------------------------

    def _wanted(self) -> Tensor:
        """bool `[R, W]`, slots of the schedule's scope."""
        scope, exists = self.schedule.scope, self.offsets < self.length[:, None]
        if scope == "canvas":
            return exists
        if scope == "masked":
            return self.masked
        if scope == "block":
            inside = (self.offsets >= self.start[:, None]) & (self.offsets < self.stop[:, None])
            return self.open | inside
        return self.open

    def _look(self) -> Step:
        """One forward of every row: the step as the schedule sees it."""
        wanted = self._wanted()
        block_start = self.width + torch.where(self.start > 0, self.start, -self.offset)  # [R], column
        first = self.cache.feed_from(self.block_step, block_start)
        last = torch.full_like(first, self.tokens.shape[1])
        if self.spec.attention in LEFT_TO_RIGHT and not self.schedule.whole:
            last = self.width + self.stop
            if self.store is not None:
                first, self.unsettled = torch.where(first < 0, self.unsettled, first), block_start
        values: dict[str, Tensor] = {}
        for rows in _groups(first < 0):
            places, flat = self._forward(rows, first[rows], last[rows], block_start[rows], wanted[rows])
            for name, value in flat.items():
                if name not in values:
                    values[name] = value.new_zeros(*self.masked.shape, *value.shape[1:])
                chosen = places.shadow if name == SHADOW else ~places.shadow
                values[name][rows[places.rows[chosen]], places.slots[chosen]] = value[chosen]
        drawn = Drawn(**{name: values.pop(name) for name in Drawn._fields})
        if bool((drawn.raw_log_prob.isnan() & wanted).any()):
            raise ValueError("the model's logits are not numbers (NaN) at a masked position; decoding cannot go on")
        return Step(
            tokens=self.tokens[:, self.width :].clone(),
            masked=self.masked,
            locked=self.locked,
            length=self.length,
            start=self.start,
            stop=self.stop,
            block=self.block,
            eligible=self.open,
            seen=wanted,
            drawn=drawn,
            read=values,
            step=self.block_step,
            total_step=self.total_step,
            masked_at_start=self.masked_at_start,
            prompts=self.prompts,
            row_ids=self.row_ids,
            noise=self.noise,
            memory=self.memory,
            mask_token_id=self.spec.mask_token_id,
            eos_token_ids=self.spec.eos_token_ids,
            selection_log_prob=torch.zeros(len(self.slot), dtype=self.raw_log_prob.dtype, device=self.slot.device),
            extra_forwards=torch.zeros_like(self.slot),
        )

    def _forward(
        self, rows: Tensor, start: Tensor, stop: Tensor, block_start: Tensor, wanted: Tensor
    ) -> tuple[_Scores, dict[str, Tensor]]:
        """One forward of some rows from column `start` (negative: 0) to `stop`; values of slots in row-major order."""
        first = torch.where(start < 0, 0, start - self.spec.logit_shift).clamp(min=0)  # [r]
        feed = int((stop - first).max())
        columns = (first[:, None] + torch.arange(feed, device=first.device)).clamp(max=self.tokens.shape[1] - 1)
        score = torch.zeros_like(columns, dtype=torch.bool)  # [r, q]
        at = wanted.nonzero(as_tuple=True)
        score[at[0], self.width + at[1] - first[at[0]]] = True
        shadow = self._shadow(rows) if self.schedule.shadow else None
        if shadow is not None:
            score = torch.cat([score, shadow.scored], dim=1)
        places = _Scores.of(score, first - self.width, shadow, feed)
        fed = rows
        if self.guided:  # every row a second time, without its prompt
            fed = torch.cat([rows, rows + len(self.slot)])
            rows, columns, block_start = rows.repeat(2), columns.repeat(2, 1), block_start.repeat(2)
        tokens = self.tokens[rows].gather(-1, columns)  # [f, q]
        keys, positions, prompt_lengths = self.keys[rows], self.positions[rows], self.prompt_lengths[rows]
        if self.guided:
            prompt = (columns < self.width) & keys.gather(-1, columns)
            prompt[: len(score)] = False
            tokens = torch.where(prompt, self.spec.mask_token_id, tokens)
        sight = one_copy(self.spec, positions, prompt_lengths, prompt_lengths + block_start - self.width)
        if sight is not None:
            sight = sight.at(columns, None if self.store is not None else columns)
        extra: dict[str, Any] = {}
        if self.store is not None:
            self.store.place(fed, columns)
            extra["past_key_values"] = self.store
        else:
            keys = keys.gather(-1, columns)
        positions = positions.gather(-1, columns)
        if shadow is not None:
            copies = 1 + self.guided
            tokens = torch.cat([tokens, torch.full_like(shadow.slots.repeat(copies, 1), self.spec.mask_token_id)], 1)
            sight = shadow.sight(self.width, feed, copies)
            beside = positions.gather(-1, (shadow.slots + self.width).repeat(copies, 1))
            positions, keys = torch.cat([positions, beside], 1), torch.cat([keys, shadow.real.repeat(copies, 1)], 1)
        if self.schedule.inputs is not None:
            extra["inputs_embeds"] = self._soft_inputs(tokens, rows)
        flat = self.model(
            input_ids=tokens,
            attention_mask=attention_mask(
                keys, tokens.shape[1], self.model.config._attn_implementation, self.model.dtype, sight
            ),
            position_ids=positions,
            score_positions=score,
            score_cfg_scale=self.config.cfg_scale,
            score_reduce=self._reduction(rows, places),
            **extra,
        )
        self.record.nfe[self.slot[rows[: len(score)]]] += 1 + self.guided
        names = (*Drawn._fields, *self.reads, *([SHADOW] if shadow is not None else []))
        return places, dict(zip(names, flat, strict=True))

    def _soft_inputs(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Embeddings `[f, q, D]` of whole rows, with those of the canvas as the schedule wants them."""
        assert self.schedule.inputs is not None
        embeddings = self.model.get_input_embeddings()(tokens)
        copies = len(rows) // len(self.slot)
        canvas = CanvasInput(embeddings[: len(self.slot), self.width :], self.masked, self.total_step, self.memory)
        soft = self.schedule.inputs(canvas).to(embeddings.dtype)
        return torch.cat([embeddings[:, : self.width], soft.repeat(copies, 1, 1)], dim=1)

    def _reduction(self, rows: Tensor, at: _Scores) -> Callable[[Tensor, slice], tuple[Tensor, ...]]:
        """What is made of logits `[c, V]`: candidates and readings."""
        config, mask = self.config, self.spec.mask_token_id
        row = rows[at.rows]
        places = Places(
            rows=row,
            positions=at.slots,
            held=torch.where(self.masked[row, at.slots], mask, self.tokens[row, self.width + at.slots]),
            row_ids=self.row_ids[row],
            steps=self.total_step[row],
            noise=self.noise,
            memory=self.memory,
            embedding=getattr(self.model, "get_input_embeddings", None),
        )

        def reduce(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
            here = places.at(part)
            logits = self._adjusted(logits, here)
            changed = logits if self.schedule.transform is None else self.schedule.transform(logits, here)
            scored = Scored(
                logits=changed,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                mask_token_id=mask,
                banned=self._banned(logits, here),
                places=here,
                model_logits=logits,
            )
            drawn = scored.drawn(scored.log_probs if changed is logits else logits.log_softmax(-1))
            read = [reading(scored) for reading in self.reads.values()]
            if self.schedule.shadow:
                read.append(scored.log_probs.gather(-1, here.held[:, None]).squeeze(-1))
            return (*drawn, *read)

        return reduce

    def _adjusted(self, logits: Tensor, places: Places) -> Tensor:
        """Logits after the options that change the model's distribution."""
        if self.config.suppress_token_ids:
            ids = torch.tensor(self.config.suppress_token_ids, device=logits.device)
            logits = logits.index_fill(-1, ids, -torch.inf)
        if self.config.eos_penalty:
            penalty = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
            penalty[list(self.spec.eos_token_ids)] = self.config.eos_penalty
            share: Tensor | float = 1.0
            if self.config.eos_penalty_decay:
                open_slots = self.masked.sum(-1)[places.rows, None]
                share = open_slots.to(logits.dtype) / self.config.canvas_length
            logits = logits - share * penalty
        return logits

    def _banned(self, logits: Tensor, places: Places) -> Tensor | None:
        """bool `[c, V]`, tokens that may not be drawn at their slot; None if there are none."""
        banned: Tensor | None = None
        if self.choices is not None:
            index = self.choice[places.rows, places.positions]
            banned = ~self.choices.sets[index.clamp(min=0)] & (index >= 0)[:, None]
        if self.config.min_new_tokens and self.spec.eos_token_ids:
            early = torch.zeros_like(logits, dtype=torch.bool)
            early[:, list(self.spec.eos_token_ids)] = (places.positions < self.config.min_new_tokens)[:, None]
            banned = early if banned is None else banned | early
        return banned

    def _shadow(self, rows: Tensor) -> _Shadow:
        start, stop = self.start[rows], self.stop[rows]
        slots = start[:, None] + torch.arange(int((stop - start).max()), device=start.device)
        real = slots < stop[:, None]
        slots = slots.clamp(max=self.masked.shape[1] - 1)
        held = ~self.masked[rows].gather(-1, slots) & ~self.locked[rows].gather(-1, slots)
        return _Shadow(slots, real, real & held)


@dataclass(frozen=True)
class _Shadow:
    """The copy of the active block that is fed beside the row: S columns of mask tokens."""

    slots: Tensor  # long [r, S], canvas offsets
    real: Tensor  # bool [r, S], whether the block has so many slots
    scored: Tensor  # bool [r, S], slots whose held token is verified

    def sight(self, width: int, feed: int, copies: int) -> Sight:
        """Rows see rows; a shadow sees the row but the slot it stands for, and itself. Nothing else sees it."""
        slots = self.slots.repeat(copies, 1)
        rows = torch.zeros(len(slots), feed, dtype=torch.long, device=slots.device)
        return Sight(
            places=torch.cat([rows, torch.full_like(slots, NOWHERE)], 1),
            horizons=torch.cat([rows, torch.zeros_like(slots)], 1) + 1,
            blocks=torch.cat([rows - 1, slots], 1),
            hidden=torch.cat([rows - 1, slots + width], 1),
        )


@dataclass(frozen=True)
class _Scores:
    """Which slots the scored columns of a forward stand for, in row-major order."""

    rows: Tensor  # long [n], among the rows of the forward
    slots: Tensor  # long [n], canvas offsets
    shadow: Tensor  # bool [n]

    @classmethod
    def of(cls, score: Tensor, first: Tensor, shadow: _Shadow | None, feed: int) -> _Scores:
        """From the scored columns bool `[r, q]` and the canvas offset of each row's first one, long `[r]`."""
        rows, columns = score.nonzero(as_tuple=True)
        slots, beside = columns + first[rows], columns >= feed
        if shadow is not None:
            slots = torch.where(beside, shadow.slots[rows, (columns - feed).clamp(min=0)], slots)
        return cls(rows, slots, beside)


def _groups(whole: Tensor) -> list[Tensor]:
    """Row indices of the rows that are fed whole, and of the others; empty groups are left out."""
    groups = [whole.nonzero().squeeze(-1), (~whole).nonzero().squeeze(-1)]
    return [rows for rows in groups if len(rows)]
