"""What a step feeds and to which forward, by cache policy and attention kind, and what it reads off the logits.

Owns the columns that are fed, who sees whom, guidance, the shadow of a block, and the reduction over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import LEFT_TO_RIGHT, NOWHERE, Sight, attention_mask, one_copy
from rl4dlm.rollout.drawing import Drawn, Places, Scored, in_parts
from rl4dlm.rollout.rows import Rows
from rl4dlm.rollout.schedules.parts import CanvasInput, Step

SHADOW = "shadow"


class Feed(Rows):
    """Rows, and one forward of them."""

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
        if bool(((drawn.raw_log_prob + drawn.confidence).isnan() & wanted).any()):
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
            score_reduce_sees_own=True,
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

    def _reduction(self, rows: Tensor, at: _Scores) -> Callable[[Tensor, slice, Tensor], tuple[Tensor, ...]]:
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

        def reduce(logits: Tensor, part: slice, own: Tensor) -> tuple[Tensor, ...]:
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
                own_logits=own,
            )
            drawn = scored.drawn()
            read = [reading(scored) for reading in self.reads.values()]
            if self.schedule.shadow:
                read.append(scored.log_probs.gather(-1, here.held[:, None]).squeeze(-1))
            return (*drawn, *read)

        return in_parts(reduce)

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
        if self.config.known_tokens is not None and self.config.known_tokens < logits.shape[-1]:
            unknown = torch.arange(logits.shape[-1], device=logits.device) >= self.config.known_tokens
            banned = unknown.expand_as(logits) if banned is None else banned | unknown
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
