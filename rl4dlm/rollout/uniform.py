"""The loop that decodes models whose noise is random tokens: canvases that are refined, not written once.

Owns what such a model is fed, its self-conditioning, and what is recorded. When a token is accepted and when a canvas
is finished is the schedule's decision. Canvases are decoded from left to right; each starts as random tokens over a
prefix that is encoded once. Rows leave the batch as soon as they are finished, so that none depends on another.

Differences from transformers' `generate`: positions do not count padding, randomness is keyed per row, step and
position, the prefix is encoded anew for each canvas instead of being continued, and steps are counted per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from rl4dlm.models.canvas import canvas_inputs
from rl4dlm.models.scoring import CHUNK_ELEMENTS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import entropy_of, lowest_argmax
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.record import EOS, STOP, Record
from rl4dlm.rollout.requests import Requests
from rl4dlm.rollout.rollout import Refinement, StopReason, Trace
from rl4dlm.rollout.schedules.parts import CanvasSchedule
from rl4dlm.rollout.stopping import Stop, stop_places


@dataclass
class CanvasRecord(Record):
    """What is known of every row, with the states in between."""

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  # [N, S, C]
    accepted: Tensor = field(default_factory=lambda: torch.empty(0))  # [N, S, C]
    unsettled: Tensor = field(default_factory=lambda: torch.empty(0))  # [N], a canvas ran out of steps

    @classmethod
    def blank(
        cls, rows: int, length: int, steps: int, block_length: int, device: torch.device, dtype: torch.dtype
    ) -> CanvasRecord:
        """A record for `steps` steps in all, of canvases of `block_length` tokens."""
        shape = (rows, steps, block_length)
        return cls(
            **vars(Record.empty(rows, length, device, dtype)),
            tokens=torch.full(shape, -1, dtype=torch.int32, device=device),
            accepted=torch.zeros(shape, dtype=torch.bool, device=device),
            unsettled=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def trace(self, *, drawn: bool, monotone: bool, resizes: bool, draws_positions: bool, requests: Requests) -> Trace:
        made = int(self.steps.max()) if len(self.steps) else 0
        # Copies: a slice would keep room for all the steps that were never needed.
        states = Refinement(self.tokens[:, :made].clone(), self.accepted[:, :made].clone())
        return Trace(self.commit_step, self.raw_log_prob, None, self.steps, states)

    def stop_reasons(self) -> list[StopReason]:
        unsettled = self.unsettled.tolist()
        complete, late = StopReason.COMPLETE, StopReason.MAX_STEPS
        return [late if r is complete and unsettled[i] else r for i, r in enumerate(super().stop_reasons())]


class _Read(NamedTuple):
    """What a step makes of its logits, per position."""

    candidate: Tensor  # long, drawn from the tempered distribution
    best: Tensor  # long, the most probable token
    entropy: Tensor  # nats, of the tempered distribution
    raw_log_prob: Tensor  # of `best`, untempered


class CanvasBatch:
    """Rows that are decoded together."""

    def __init__(
        self,
        model: Any,
        spec: DiffusionSpec,
        prompts: list[list[int]],
        row_ids: list[int],
        record: CanvasRecord,
        config: DecodingConfig,
        schedule: CanvasSchedule,
        noise: NoiseSource,
        stop: Stop | None = None,
    ) -> None:
        self.model, self.spec, self.record, self.config = model, spec, record, config
        self.schedule, self.noise, self.waits_for = schedule, noise, stop
        assert config.block_length is not None
        self.block_length = config.block_length
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        device, rows = record.canvas.device, len(prompts)
        self.width = max((len(p) for p in prompts), default=0)  # columns of the left-padded prompt
        self.tokens = torch.zeros(rows, self.width + config.canvas_length, dtype=torch.long, device=device)  # [R, T]
        self.keys = torch.ones_like(self.tokens, dtype=torch.bool)  # [R, T]
        for row, prompt in enumerate(prompts):
            padding = self.width - len(prompt)
            self.keys[row, :padding] = False
            self.tokens[row, padding : self.width] = torch.tensor(prompt, device=device)
        self.row_ids = torch.tensor(row_ids, dtype=torch.long, device=device)

    def decode(self) -> Iterator[int]:
        """Runs until every row is finished; yields how many slots each canvas settled."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        canvas = self.tokens[:, self.width :]  # [R, L], a view
        for start in range(0, self.config.canvas_length, self.block_length):
            if not len(rows):
                break
            self._denoise(rows, start)
            yield len(rows) * self.block_length
            stop = start + self.block_length
            if self.waits_for is not None:
                rows = self._stopped(self.waits_for, rows, stop)
            if self.config.stop_at_eos and stop < self.config.canvas_length and self.spec.eos_token_ids:
                ends = torch.tensor(self.spec.eos_token_ids, device=canvas.device)
                ended = torch.isin(canvas[rows, start:stop], ends).any(-1)
                canvas[rows[ended], stop:] = self.spec.eos_token_ids[0]
                self.record.reason[rows[ended]] = EOS
                rows = rows[~ended]
        self.record.canvas[:] = canvas

    def _stopped(self, stop: Stop, rows: Tensor, length: int) -> Tensor:
        """Ends rows whose end is in the first so many slots; returns the others."""
        canvas = self.tokens[:, self.width :]
        part = canvas[rows, :length]
        places = stop_places(stop, part, torch.ones_like(part, dtype=torch.bool), self.spec.eos_token_ids)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            if place >= 0:
                canvas[row, place:], self.record.reason[row] = self.spec.eos_token_ids[0], STOP
                self.record.commit_step[row, place:], self.record.raw_log_prob[row, place:] = -1, 0.0
        return rows[places < 0]

    def _denoise(self, rows: Tensor, start: int) -> None:
        """Decodes the canvas that starts at an offset, for some rows."""
        first, length, record = self.width + start, self.block_length, self.record
        offsets = start + torch.arange(length, device=rows.device)
        cache = DynamicCache(config=self.model.config.get_text_config())
        state = self._random("canvas", rows, offsets)  # [r, C]
        history = torch.full((len(rows), self.schedule.stability, length), -1, device=rows.device)
        condition: Tensor | None = None  # [r, C, V], tempered logits of the step before
        record.nfe[rows] += 1  # the encoder
        for remaining in range(self.schedule.max_steps, 0, -1):
            inputs = canvas_inputs(self.tokens[rows, :first], self.keys[rows, : first + length], state)
            if condition is not None:  # the prefix is in the cache
                inputs = {name: value for name, value in inputs.items() if name.startswith("decoder_")}
            logits = self.model(**inputs, past_key_values=cache, self_conditioning_logits=condition).logits
            tempered = logits / self.schedule.temperature(remaining)
            steps = record.steps[rows].clone()
            read = self._read(logits, tempered, rows, steps, offsets)
            accepted = self.schedule.accept(read.entropy)
            record.tokens[rows, steps] = state.int()
            record.accepted[rows, steps] = accepted
            record.nfe[rows] += 1
            settled = (history == read.best[:, None]).all(-1).all(-1)  # true if no stability is asked for
            settled &= read.entropy.mean(-1) < self.schedule.confidence
            done = settled | (remaining == 1)
            self.tokens[rows[done], first : first + length] = read.best[done]
            places = slice(start, start + length)
            record.commit_step[rows[done], places] = steps[done, None]
            record.raw_log_prob[rows[done], places] = read.raw_log_prob[done].to(record.raw_log_prob.dtype)
            record.unsettled[rows[done]] |= ~settled[done]
            renewed = self._random("renewal", rows, offsets)  # keyed by the step, before it is counted
            record.steps[rows] += 1
            keep = (~done).nonzero().squeeze(-1)
            if not len(keep):
                return
            state = torch.where(accepted, read.candidate, renewed)[keep]
            history = torch.cat([history, read.best[:, None]], dim=1)[keep, 1:]
            condition = tempered[keep].to(self.model.dtype)
            if bool(done.any()):
                rows = rows[keep]
                cache.batch_select_indices(keep)

    def _random(self, purpose: str, rows: Tensor, offsets: Tensor) -> Tensor:
        """Random tokens `[r, C]`, keyed by row, its step and the canvas offset."""
        keys = self._keys(rows, self.record.steps[rows], offsets)
        uniform = self.noise.uniform(purpose, *keys).view(len(rows), -1)
        return (uniform * self.vocabulary).long()

    def _keys(self, rows: Tensor, steps: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(rows), len(offsets))
        keys = (self.row_ids[rows, None], steps[:, None], offsets)
        row, step, offset = (key.expand(shape).flatten() for key in keys)
        return row, step, offset

    def _read(self, logits: Tensor, tempered: Tensor, rows: Tensor, steps: Tensor, offsets: Tensor) -> _Read:
        """Draws candidates and measures entropies, a chunk of positions at a time."""
        keys = self._keys(rows, steps, offsets)
        flat, raw = tempered.flatten(0, 1), logits.flatten(0, 1)  # [r * C, V]
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        parts = []
        for begin in range(0, len(flat), size):
            part = slice(begin, begin + size)
            log_probs = flat[part].log_softmax(-1)
            probabilities, entropy = log_probs.exp(), entropy_of(log_probs)
            known = self.config.known_tokens or self.vocabulary
            best = lowest_argmax(raw[part][:, :known])
            chosen = raw[part].log_softmax(-1).gather(-1, best[:, None]).squeeze(-1)
            drawable = probabilities[:, :known]
            if known < self.vocabulary:
                drawable = drawable / drawable.sum(-1, keepdim=True)
            candidate = self.noise.draw(drawable, *(key[part] for key in keys))
            parts.append(_Read(candidate, best, entropy, chosen))
        read = _Read(*(torch.cat(column).view(len(rows), -1) for column in zip(*parts, strict=True)))
        if bool(read.raw_log_prob.isnan().any()):
            raise ValueError("the model's logits are not numbers (NaN) on a canvas; decoding cannot go on")
        return read
