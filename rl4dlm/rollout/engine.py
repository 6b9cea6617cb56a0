"""The rollout engine: prompts to rollouts under a schedule and a cache policy.

`RolloutEngine` owns the loop: which rows are alive, in which block each is, what is fed to the model and what is
recorded. It knows nothing about tokenization, rewards or training; what is written when is decided by the schedule,
what is fed by the cache policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rl4dlm.models.attention import attention_mask, position_ids
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy, build_cache
from rl4dlm.rollout.caches.store import KeyValueStore
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import Drawn, draw_tokens
from rl4dlm.rollout.noise import KeyedNoise, NoiseSource
from rl4dlm.rollout.rollout import Rollout, Trace, valid_mask
from rl4dlm.rollout.schedules.parts import Schedule, Window, top

PROGRESS_DELAY = 5.0
"""Seconds after which a progress bar appears."""


class RolloutEngine:
    """Decodes prompts with a denoiser.

    Args:
        model: a denoiser (or a PEFT model around one); scoring is attached if it is not yet.
        spec: how it denoises; None reads it from the model.
        max_batch_rows: rows decoded at the same time; None decodes all at once.
        progress: shows a progress bar when decoding takes longer than a few seconds.
    """

    def __init__(
        self,
        model: Any,
        spec: DiffusionSpec | None = None,
        *,
        max_batch_rows: int | None = None,
        progress: bool = False,
    ) -> None:
        if max_batch_rows is not None and max_batch_rows < 1:
            raise ValueError(f"max_batch_rows={max_batch_rows} is not allowed; it must be 1 or larger, or None")
        self.model = attach_scoring(model)
        own = DiffusionSpec.of(model)
        self.spec = spec or own
        if (self.spec.logit_shift, self.spec.attention) != (own.logit_shift, own.attention):
            raise ValueError(
                f"spec has logit_shift={self.spec.logit_shift} and attention={self.spec.attention!r}, but the model "
                f"says logit_shift={own.logit_shift} and attention={own.attention!r}"
            )
        if self.spec.noise != "mask":
            raise ValueError(f"noise={self.spec.noise!r} cannot be decoded by this engine; supported: mask")
        self.max_batch_rows = max_batch_rows
        self.progress = progress
        self.weight_version: int | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        *,
        num_generations: int = 1,
        row_ids: Sequence[int] | None = None,
        seed: int = 0,
        hints: Sequence[Mapping[int, int]] | None = None,
        noise: NoiseSource | None = None,
    ) -> Rollout:
        """Decodes each prompt `num_generations` times.

        Args:
            prompts: token ids, without padding.
            config: the decoding settings.
            num_generations: G; rows are prompt-major, `row = prompt * G + g`.
            row_ids: one integer per row that keys its randomness; a row's result depends on it, the seed, the prompt
                and the weights alone. None: 0, 1, 2, ….
            seed: of the run.
            hints: per row, a mapping from canvas offset to token id: written from the start, visible, never changed.
            noise: where randomness is taken from; None draws keyed noise from `seed`.

        Returns:
            A `Rollout` whose tensors are on the model's device.

        Raises:
            ValueError: a bad prompt, row id or hint, or logits that are not numbers.
        """
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} is not allowed; it must be 1 or larger")
        rows = [list(map(int, prompt)) for prompt in prompts for _ in range(num_generations)]
        ids = list(range(len(rows))) if row_ids is None else [int(i) for i in row_ids]
        self._check(prompts, rows, ids, hints, config)
        noise = noise or KeyedNoise(seed)
        schedule, cache = config.build_schedule(), build_cache(config.cache)
        size = self.max_batch_rows or max(1, len(rows))
        length = config.canvas_length
        wide = torch.promote_types(self.model.dtype, torch.float32)
        record = _Record.empty(len(rows), length, self.model.device, wide)
        for row, given in enumerate(hints or ()):
            for offset, token in given.items():
                record.canvas[row, offset], record.hinted[row, offset] = token, True
        slots = int((~record.hinted).sum())
        with (
            _evaluating(self.model),
            tqdm(
                total=slots, desc="decoding", unit="tok", delay=PROGRESS_DELAY, disable=not self.progress, leave=False
            ) as bar,
        ):
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                batch = _Batch(self, rows[part], ids[part], record.part(part), config, schedule, cache, noise)
                for committed in batch.decode():
                    bar.update(committed)
        return Rollout(
            prompt_ids=rows,
            canvas=record.canvas,
            valid=valid_mask(record.canvas, self.spec.eos_token_ids),
            hinted=record.hinted,
            trace=Trace(
                commit_step=record.commit_step,
                raw_log_prob=record.raw_log_prob,
                log_prob=record.log_prob if config.temperature > 0 else None,
                steps=record.steps,
            ),
            nfe=record.nfe,
            stop_reason=["eos" if early else "complete" for early in record.stopped_early.tolist()],
            row_ids=ids,
            schedule=config.schedule,
            cache=config.cache,
            exact=self.spec.attention in cache.exact_for,
            seed=seed,
            mask_token_id=self.spec.mask_token_id,
            weight_version=self.weight_version,
        )

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[list[int]],
        row_ids: list[int],
        hints: Sequence[Mapping[int, int]] | None,
        config: DecodingConfig,
    ) -> None:
        text = self.model.config.get_text_config()
        mask, vocabulary = self.spec.mask_token_id, text.vocab_size
        limit = getattr(text, "max_position_embeddings", None)
        for name in ("suppress_token_ids", "defer_token_ids"):
            outside = [i for i in getattr(config, name) if i >= vocabulary]
            if outside:
                raise ValueError(f"{name} has ids {outside} outside 0..{vocabulary - 1}, the model's vocabulary")
        if len({*config.suppress_token_ids, mask}) == vocabulary:
            raise ValueError("suppress_token_ids leaves nothing to draw but the mask token")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{i}] is empty; a prompt has at least one token")
            if mask in prompt:
                raise ValueError(f"prompts[{i}] contains the mask token (id {mask}); prompts hold written text only")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise ValueError(f"prompts[{i}] has a token id outside 0..{vocabulary - 1}, the model's vocabulary")
            if limit is not None and len(prompt) + config.canvas_length > limit:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens, which with canvas_length={config.canvas_length} exceeds "
                    f"the model's {limit} positions; at most {limit - config.canvas_length} are allowed"
                )
        if len(row_ids) != len(rows) or len(set(row_ids)) != len(row_ids):
            raise ValueError(f"row_ids must be {len(rows)} different integers (prompts x num_generations)")
        if hints is None:
            return
        if len(hints) != len(rows):
            raise ValueError(f"hints has {len(hints)} entries; one per row is needed: {len(rows)}")
        for row, given in enumerate(hints):
            for offset, token in given.items():
                if not 0 <= offset < config.canvas_length or not 0 <= token < vocabulary or token == mask:
                    raise ValueError(
                        f"hints[{row}] maps offset {offset} to token {token}; allowed: offsets 0.."
                        f"{config.canvas_length - 1}, ids 0..{vocabulary - 1} except the mask token {mask}"
                    )


@dataclass
class _Record:
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
    def empty(cls, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> _Record:
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

    def part(self, rows: slice) -> _Record:
        return _Record(**{name: value[rows] for name, value in vars(self).items()})


class _Batch:
    """Rows that are decoded together. The state below is that of the rows still alive; `slot` says which they are."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: list[list[int]],
        row_ids: list[int],
        record: _Record,
        config: DecodingConfig,
        schedule: Schedule,
        cache: CachePolicy,
        noise: NoiseSource,
    ) -> None:
        self.model, self.spec = engine.model, engine.spec
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
        self.row_ids = torch.tensor(row_ids, dtype=torch.long, device=device)
        self.slot = torch.arange(rows, device=device)
        self.block = torch.full((rows,), -1, device=device)
        self.block_step = torch.zeros(rows, dtype=torch.long, device=device)
        self.total_step = torch.zeros(rows, dtype=torch.long, device=device)
        self.masked_at_start = torch.zeros(rows, dtype=torch.long, device=device)
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
        for name in ("tokens", "keys", "positions", "masked", "row_ids", "slot"):
            setattr(self, name, getattr(self, name)[keep])
        for name in ("block", "block_step", "total_step", "masked_at_start"):
            setattr(self, name, getattr(self, name)[keep])

    def _enter_blocks(self) -> None:
        """Moves each row on to its first block with masked slots."""
        offsets = torch.arange(self.config.canvas_length, device=self.masked.device)
        moved = torch.ones_like(self.block, dtype=torch.bool)
        while bool(moved.any()):
            lo, hi = self.schedule.blocks.bounds(self.block)
            inside = (offsets >= lo[:, None]) & (offsets < hi[:, None])
            moved = (self.block < 0) | ~(self.masked & inside).any(-1)
            self.block = self.block + moved.long()
            self.block_step = torch.where(moved, 0, self.block_step)
        lo, hi = self.schedule.blocks.bounds(self.block)
        inside = (offsets >= lo[:, None]) & (offsets < hi[:, None])
        entered = self.block_step == 0
        self.masked_at_start = torch.where(entered, (self.masked & inside).sum(-1), self.masked_at_start)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        lo, hi = self.schedule.blocks.bounds(self.block)
        width = int((hi - lo).max())
        offsets = lo[:, None] + torch.arange(width, device=lo.device)  # [R, W]
        inside = offsets < hi[:, None]
        offsets = offsets.clamp(max=self.config.canvas_length - 1)
        eligible = self.masked.gather(-1, offsets) & inside
        drawn = self._draw(offsets, eligible, lo)
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

    def _draw(self, offsets: Tensor, eligible: Tensor, block_start: Tensor) -> Drawn:
        """Candidates for the eligible positions: tensors `[R, W]`, undefined elsewhere."""
        start = self.cache.feed_from(self.block_step, block_start)
        dense: list[Tensor] | None = None
        for rows in _groups(start < 0):
            drawn = self._forward(rows, int(start[rows[0]]) < 0, start[rows], offsets[rows], eligible[rows])
            if dense is None:
                dense = [torch.zeros(eligible.shape, dtype=f.dtype, device=f.device) for f in drawn]
            for whole, flat in zip(dense, drawn, strict=True):
                whole[rows] = whole[rows].masked_scatter(eligible[rows], flat)
        assert dense is not None
        result = Drawn(*dense)
        if bool((result.raw_log_prob.isnan() & eligible).any()):
            raise ValueError("the model's logits are not numbers (NaN) at a masked position; decoding cannot go on")
        return result

    def _forward(self, rows: Tensor, whole: bool, start: Tensor, offsets: Tensor, eligible: Tensor) -> Drawn:
        """One forward of some rows, whole or from their `start` on; candidates in row-major order of `eligible`."""
        length = self.tokens.shape[1]
        first = torch.zeros_like(start) if whole else start + self.width - self.spec.logit_shift  # [r]
        feed = length - int(first.min())
        columns = (first[:, None] + torch.arange(feed, device=first.device)).clamp(max=length - 1)  # [r, q]
        tokens, keys = self.tokens[rows].gather(-1, columns), self.keys[rows]
        positions = self.positions[rows].gather(-1, columns)
        score = torch.zeros_like(tokens, dtype=torch.bool)
        at = offsets + self.width - first[:, None]
        places = eligible.nonzero(as_tuple=True)
        score[places[0], at[places]] = True
        if self.guided:
            prompt = (columns < self.width) & keys.gather(-1, columns)
            tokens = torch.cat([tokens, torch.where(prompt, self.spec.mask_token_id, tokens)])
            keys, positions, columns = keys.repeat(2, 1), positions.repeat(2, 1), columns.repeat(2, 1)
        implementation, dtype = self.model.config._attn_implementation, self.model.dtype
        extra: dict[str, Any] = {}
        if self.store is not None:
            slots = torch.cat([rows, rows + len(self.slot)]) if self.guided else rows
            self.store.place(slots, columns)
            extra["past_key_values"] = self.store
        ids, steps = self.row_ids[rows], self.total_step[rows]
        keyed = (ids[places[0]], steps[places[0]], offsets[places])

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
            attention_mask=attention_mask(keys, feed, implementation, dtype),
            position_ids=positions,
            score_positions=score,
            score_cfg_scale=self.config.cfg_scale,
            score_reduce=reduce,
            **extra,
        )
        self.record.nfe[self.slot[rows]] += 1 + self.guided
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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
