"""The loop that decodes a batch of rows.

Owns which rows are alive, in which block each is, what is fed to the model and what is recorded. What is written when
is decided by the schedule, from where a row is fed by the cache policy, who sees whom by the model's attention kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rl4dlm.models.attention import BLOCK_KINDS, LEFT_TO_RIGHT, attention_mask, block_starts, one_copy, position_ids
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy
from rl4dlm.rollout.caches.store import KeyValueStore
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import Drawn, draw_tokens
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.rollout import Trace
from rl4dlm.rollout.schedules.parts import Schedule, Window, top


@dataclass
class Record:
    """What is known of every row; batches write into views of it."""

    canvas: Tensor  # [N, L]
    hinted: Tensor  # [N, L]
    commit_step: Tensor  # [N, L]
    raw_log_prob: Tensor  # [N, L]
    log_prob: Tensor  # [N, L]
    steps: Tensor  # [N]
    nfe: Tensor  # [N]
    stopped_early: Tensor  # [N]

    @classmethod
    def empty(cls, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Record:
        shape = (rows, length)
        return cls(
            canvas=torch.zeros(shape, dtype=torch.long, device=device),
            hinted=torch.zeros(shape, dtype=torch.bool, device=device),
            commit_step=torch.full(shape, -1, dtype=torch.long, device=device),
            raw_log_prob=torch.zeros(shape, dtype=dtype, device=device),
            log_prob=torch.zeros(shape, dtype=dtype, device=device),
            steps=torch.zeros(rows, dtype=torch.long, device=device),
            nfe=torch.zeros(rows, dtype=torch.long, device=device),
            stopped_early=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def part(self, rows: slice) -> Self:
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})

    def trace(self, drawn: bool) -> Trace:
        """How the rows came about; `drawn`: at a temperature above 0."""
        return Trace(self.commit_step, self.raw_log_prob, self.log_prob if drawn else None, self.steps)

    def stop_reasons(self) -> list[str]:
        return ["eos" if early else "complete" for early in self.stopped_early.tolist()]


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
    ) -> None:
        self.model, self.spec = model, spec
        self.record, self.config, self.schedule, self.cache, self.noise = record, config, schedule, cache, noise
        device, rows, length = record.canvas.device, len(prompts), config.canvas_length
        self.width = max((len(p) for p in prompts), default=0)  # columns of the left-padded prompt
        self.tokens = torch.full((rows, self.width + length), self.spec.mask_token_id, device=device)  # [R, T]
        self.keys = torch.ones_like(self.tokens, dtype=torch.bool)  # [R, T]
        for row, prompt in enumerate(prompts):
            padding = self.width - len(prompt)
            self.tokens[row, :padding], self.keys[row, :padding] = 0, False
            self.tokens[row, padding : self.width] = torch.tensor(prompt, device=device)
        self.masked = ~record.hinted  # [R, L]
        self.tokens[:, self.width :] = torch.where(self.masked, self.spec.mask_token_id, record.canvas)
        self.positions = position_ids(self.keys)  # [R, T]
        self.prompt_lengths = self.keys[:, : self.width].sum(-1)  # [R]
        self.offset = torch.zeros_like(self.prompt_lengths)  # prompt tokens in the first block that is written
        if spec.attention in BLOCK_KINDS:
            first = block_starts(spec, self.prompt_lengths[:, None], self.prompt_lengths)
            self.offset = self.prompt_lengths - first.squeeze(-1)
        self.row_ids = torch.tensor(row_ids, dtype=torch.long, device=device)
        self.slot = torch.arange(rows, device=device)
        self.block = torch.full((rows,), -1, device=device)
        self.block_step = torch.zeros(rows, dtype=torch.long, device=device)
        self.total_step = torch.zeros(rows, dtype=torch.long, device=device)
        self.masked_at_start = torch.zeros(rows, dtype=torch.long, device=device)
        self.unsettled = torch.full((rows,), -1, device=device)  # first column whose stored keys may still change
        self.guided = config.cfg_scale > 0
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
            self._retire(self._finished())
            yield before - int(self.masked.sum())

    # --- rows -------------------------------------------------------------------------------------------------------

    def _finished(self) -> Tensor:
        """bool `[R]`: every slot is written, or every slot up to the first end-of-sequence token is."""
        finished = ~self.masked.any(-1)
        if self.config.stop_at_eos:
            canvas = self.tokens[:, self.width :]
            is_eos = torch.isin(canvas, torch.tensor(self.spec.eos_token_ids, dtype=canvas.dtype, device=canvas.device))
            finished |= (is_eos & ~self.masked & (self.masked.cumsum(-1) == 0)).any(-1)
        return finished

    def _retire(self, finished: Tensor) -> None:
        """Records finished rows and removes them from the batch."""
        if not bool(finished.any()):
            return
        canvas = self.tokens[finished, self.width :]
        slots, masked = self.slot[finished], self.masked[finished]
        unwritten = next(iter(self.spec.eos_token_ids), self.spec.mask_token_id)  # without an end, no row stops early
        self.record.canvas[slots] = torch.where(masked, unwritten, canvas)
        self.record.stopped_early[slots] = masked.any(-1)
        self.record.steps[slots] = self.total_step[finished]
        keep = (~finished).nonzero().squeeze(-1)
        if self.store is not None:
            self.store.compact(torch.cat([keep, keep + len(self.slot)]) if self.guided else keep)
        for name in ("tokens", "keys", "positions", "prompt_lengths", "offset", "masked", "row_ids", "slot"):
            setattr(self, name, getattr(self, name)[keep])
        for name in ("block", "block_step", "total_step", "masked_at_start", "unsettled"):
            setattr(self, name, getattr(self, name)[keep])

    def _enter_blocks(self) -> None:
        """Moves each row on to its first block with masked slots."""
        offsets = torch.arange(self.config.canvas_length, device=self.masked.device)
        moved = torch.ones_like(self.block, dtype=torch.bool)
        while bool(moved.any()):
            lo, hi = self.schedule.blocks.bounds(self.block, self.offset)
            inside = (offsets >= lo[:, None]) & (offsets < hi[:, None])
            moved = (self.block < 0) | ~(self.masked & inside).any(-1)
            self.block = self.block + moved.long()
            self.block_step = torch.where(moved, 0, self.block_step)
        lo, hi = self.schedule.blocks.bounds(self.block, self.offset)
        inside = (offsets >= lo[:, None]) & (offsets < hi[:, None])
        entered = self.block_step == 0
        self.masked_at_start = torch.where(entered, (self.masked & inside).sum(-1), self.masked_at_start)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        lo, hi = self.schedule.blocks.bounds(self.block, self.offset)
        width = int((hi - lo).max())
        offsets = lo[:, None] + torch.arange(width, device=lo.device)  # [R, W]
        inside = offsets < hi[:, None]
        offsets = offsets.clamp(max=self.config.canvas_length - 1)
        eligible = self.masked.gather(-1, offsets) & inside
        drawn = self._draw(offsets, eligible, lo, hi)
        window = Window(
            eligible=eligible,
            positions=offsets,
            drawn=drawn,
            step=self.block_step,
            total_step=self.total_step,
            masked_at_start=self.masked_at_start,
            row_ids=self.row_ids,
            noise=self.noise,
        )
        scores = self.schedule.confidence(window)
        if self.config.defer_token_ids:
            deferred = torch.isin(drawn.token, torch.tensor(self.config.defer_token_ids, device=lo.device))
            scores = scores.masked_fill(deferred, -torch.inf)
        commit = self.schedule.commit(window, scores) & eligible
        stuck = ~commit.any(-1)
        commit |= top(scores, eligible, torch.ones_like(self.block)) & stuck[:, None]
        self._commit(offsets, commit, drawn)

    def _draw(self, offsets: Tensor, eligible: Tensor, lo: Tensor, hi: Tensor) -> Drawn:
        """Candidates for the eligible positions: tensors `[R, W]`, undefined elsewhere."""
        block_start = self.width + torch.where(lo > 0, lo, -self.offset)  # [R], column
        start = self.cache.feed_from(self.block_step, block_start)
        stop = torch.full_like(start, self.tokens.shape[1])
        if self.spec.attention in LEFT_TO_RIGHT:
            stop = self.width + hi
            if self.store is not None:
                start, self.unsettled = torch.where(start < 0, self.unsettled, start), block_start
        dense: list[Tensor] | None = None
        for rows in _groups(start < 0):
            drawn = self._forward(rows, start[rows], stop[rows], block_start[rows], offsets[rows], eligible[rows])
            if dense is None:
                dense = [torch.zeros(eligible.shape, dtype=f.dtype, device=f.device) for f in drawn]
            for whole, flat in zip(dense, drawn, strict=True):
                whole[rows] = whole[rows].masked_scatter(eligible[rows], flat)
        assert dense is not None
        result = Drawn(*dense)
        if bool((result.raw_log_prob.isnan() & eligible).any()):
            raise ValueError("the model's logits are not numbers (NaN) at a masked position; decoding cannot go on")
        return result

    def _forward(
        self, rows: Tensor, start: Tensor, stop: Tensor, block_start: Tensor, offsets: Tensor, eligible: Tensor
    ) -> Drawn:
        """One forward of some rows from column `start` (negative: 0) to `stop`; candidates in row-major order."""
        first = torch.where(start < 0, 0, start - self.spec.logit_shift).clamp(min=0)  # [r]
        feed = int((stop - first).max())
        columns = (first[:, None] + torch.arange(feed, device=first.device)).clamp(max=self.tokens.shape[1] - 1)
        score = torch.zeros_like(columns, dtype=torch.bool)  # [r, q]
        at = offsets + self.width - first[:, None]
        places = eligible.nonzero(as_tuple=True)
        score[places[0], at[places]] = True
        keyed = (self.row_ids[rows][places[0]], self.total_step[rows][places[0]], offsets[places])
        slots = rows
        if self.guided:  # every row a second time, without its prompt
            slots = torch.cat([rows, rows + len(self.slot)])
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
            self.store.place(slots, columns)
            extra["past_key_values"] = self.store
        else:
            keys = keys.gather(-1, columns)

        def reduce(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
            return draw_tokens(
                logits,
                lambda probabilities: self.noise.draw(probabilities, *(key[part] for key in keyed)),
                mask_token_id=self.spec.mask_token_id,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                suppress=self.config.suppress_token_ids,
            )

        flat = self.model(
            input_ids=tokens,
            attention_mask=attention_mask(keys, feed, self.model.config._attn_implementation, self.model.dtype, sight),
            position_ids=positions.gather(-1, columns),
            score_positions=score,
            score_cfg_scale=self.config.cfg_scale,
            score_reduce=reduce,
            **extra,
        )
        self.record.nfe[self.slot[rows[: len(score)]]] += 1 + self.guided
        return Drawn(*flat)

    def _commit(self, offsets: Tensor, commit: Tensor, drawn: Drawn) -> None:
        rows, columns = commit.nonzero(as_tuple=True)
        slots, places = self.slot[rows], offsets[rows, columns]
        self.tokens[rows, self.width + places] = drawn.token[rows, columns]
        self.masked[rows, places] = False
        self.record.commit_step[slots, places] = self.total_step[rows]
        self.record.raw_log_prob[slots, places] = drawn.raw_log_prob[rows, columns].to(self.record.raw_log_prob.dtype)
        self.record.log_prob[slots, places] = drawn.log_prob[rows, columns].to(self.record.log_prob.dtype)
        self.block_step = self.block_step + 1
        self.total_step = self.total_step + 1


def _groups(whole: Tensor) -> list[Tensor]:
    """Row indices of the rows that are fed whole, and of the others; empty groups are left out."""
    groups = [whole.nonzero().squeeze(-1), (~whole).nonzero().squeeze(-1)]
    return [rows for rows in groups if len(rows)]
