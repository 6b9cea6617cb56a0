"""What a step feeds and to which forward, by cache policy and attention kind, and what it reads off the logits.

Owns the columns that are fed, who sees whom, guidance, the shadow of a block, and the reduction over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import BLOCK_KINDS, LEFT_TO_RIGHT, Sight, attention_mask, one_copy
from rl4dlm.rollout.caches import Now
from rl4dlm.rollout.drawing import Drawn, Places, Scored, in_parts
from rl4dlm.rollout.lengths import ResizedRows
from rl4dlm.rollout.options import adjusted, banned
from rl4dlm.rollout.part import Part, Scores, Shadow, chosen_columns
from rl4dlm.rollout.schedules.parts import Ahead, CanvasInput, Step

SHADOW = "shadow"
STATES = "states"
DRAWN = "drawn"
NUMBERS = ("raw_log_prob", "confidence", "log_prob", "entropy")
"""What is drawn besides the token; the first two are looked at for whether they are numbers."""


class Feed(ResizedRows):
    """Rows, and one forward of them."""

    upcoming: Tensor | None = None  # long [R, W], for policies that foresee what a step writes
    states: Tensor | None = None  # [R, W, D], of the last forward, for schedules that read them

    def _look(self) -> Step:
        """One forward of every row: the step as the schedule sees it."""
        wanted, size = self._wanted(), self.masked.shape[1]
        values: dict[str, Tensor] = {}
        self.broken = self.slot.new_zeros((), dtype=torch.bool)
        for part in self._parts(wanted):
            places, flat = self._forward(part, wanted)
            index = places.rows * size + places.slots
            numbers = [flat.pop(name) for name in NUMBERS]  # of one dtype, so put in place together
            flat[DRAWN] = torch.stack(numbers, dim=-1)
            self.broken = self.broken | flat[DRAWN][:, :2].isnan().any()
            for name, value in flat.items():
                if name not in values:
                    values[name] = value.new_zeros(self.masked.numel(), *value.shape[1:])
                if part.shadow is None:
                    values[name][index] = value
                else:
                    chosen = places.shadow if name == SHADOW else ~places.shadow
                    values[name][index[chosen]] = value[chosen]
        values = {name: value.view(*self.masked.shape, *value.shape[1:]) for name, value in values.items()}
        if self.states is not None:
            values[STATES], self.states = self.states, None
        drawn = Drawn(values.pop("token"), **dict(zip(NUMBERS, values.pop(DRAWN).unbind(-1), strict=True)))
        return Step(
            tokens=self.tokens[:, self.width :].clone(),
            masked=self.masked,
            locked=self.locked,
            length=self.length,
            start=self.start,
            stop=self.stop,
            block=self.block,
            reach=self.reach,
            eligible=self.eligible,
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
        """bool `[R, W]`, slots of the schedule's scope, and all open ones where a completion is recorded."""
        if self.requests.complete:
            return self._in_scope() | (self.masked & self.requests.due(self.total_step)[:, None])
        return self._in_scope()

    def _in_scope(self) -> Tensor:
        if self.cache.foresees:
            self.upcoming = self._upcoming()
            return self.upcoming >= 0
        scope, exists = self.schedule.scope, self.offsets < self.length[:, None]
        if scope == "canvas":
            return exists
        if scope == "masked":
            return self.masked
        if scope == "block":
            inside = (self.offsets >= self.start[:, None]) & (self.offsets < self.stop[:, None])
            return self.eligible | inside
        return self.eligible

    def _upcoming(self) -> Tensor:
        """long `[R, W]`, the order of the slots that the step will write; -1 elsewhere."""
        assert self.schedule.upcoming is not None
        fields = (self.eligible, self.block_step, self.total_step, self.masked_at_start, self.row_ids, self.noise)
        return self.schedule.upcoming(Ahead(*fields))

    def _parts(self, wanted: Tensor) -> list[Part]:
        """What is fed, as forwards: one, or one of the rows that are refreshed and one of the others."""
        columns, shift = self.tokens.shape[1], self.spec.logit_shift
        seen: Tensor | None = None  # [R], behind the last column that the active block can see
        if self.spec.attention in LEFT_TO_RIGHT and not self.schedule.whole and not self.requests.complete:
            seen = self._behind()
        shadow = self._shadow() if self.schedule.shadow else None
        if self.store is None:
            return [Part(None, slice(0, columns if seen is None else int(seen.max())), shadow=shadow)]
        start = self.width + self._block_start()
        plan = self.cache.plan(self._now(start))
        whole = plan.first < 0
        first = plan.first if seen is None else torch.where(whole, self.before, plan.first)
        first = (first - shift).clamp(min=0)
        last = torch.full_like(first, columns) if plan.last is None else plan.last
        last = last if seen is None else torch.minimum(last, seen)
        chosen: Tensor | None = None
        if plan.among is not None:
            column = torch.arange(columns, device=first.device)
            needed = torch.cat([wanted.new_zeros(len(wanted), self.width), wanted], dim=1)
            if shift:
                needed = needed | torch.nn.functional.pad(needed[:, shift:], (0, shift))
            inside = (column >= first[:, None]) & (column < last[:, None])
            chosen = (inside & (plan.among | whole[:, None])) | needed
        self.before = start
        self.refreshed = torch.where(whole, self.block, self.refreshed)
        told = [first, last, whole.long(), *([] if seen is None else [seen])]
        firsts, lasts, wholes, *ends = torch.stack(told).tolist()
        groups = [list(range(len(firsts)))]
        if seen is None and not self.cache.shares and 0 < sum(wholes) < len(wholes):
            groups = [[row for row in groups[0] if wholes[row] == kind] for kind in (1, 0)]
        parts = []
        for group in groups:
            rows = None if len(group) == len(firsts) else torch.tensor(group, device=first.device)
            spans = {(firsts[row], lasts[row]) for row in group}
            attended = max(ends[0][row] for row in group) if ends else columns  # fed now or before
            if chosen is not None and not all(wholes[row] for row in group):
                parts.append(chosen_columns(rows, chosen if rows is None else chosen[rows], attended))
            elif len(spans) == 1:
                parts.append(Part(rows, slice(*spans.pop()), seen=attended))
            else:
                feed = max(end - begin for begin, end in spans)
                begin, end = (first, last) if rows is None else (first[rows], last[rows])
                index = begin[:, None] + torch.arange(feed, device=first.device)
                parts.append(Part(rows, torch.minimum(index, end[:, None] - 1), index < end[:, None], attended))
        if self.fed is not None:
            for part in parts:
                self._note_fed(part)
        return parts

    def _block_start(self) -> Tensor:
        """long `[R]`, canvas offset at which the active block starts; negative where that is in the prompt."""
        if self.spec.attention not in BLOCK_KINDS:
            return self.start
        return torch.where(self.start > 0, self.start, -self.offset)

    def _behind(self) -> Tensor:
        """long `[R]`, the column behind the active block and those that are open besides.

        Where masked tokens see all that is written, what was given further on counts, too.
        """
        behind = torch.maximum(self.stop, self.reach)
        if self.spec.attention == "written_first":
            written = ~self.masked & (self.offsets < self.length[:, None])
            behind = torch.maximum(behind, ((self.offsets + 1) * written).amax(-1))
        return self.width + behind

    def _now(self, start: Tensor) -> Now:
        return Now(
            width=self.width,
            columns=self.tokens.shape[1],
            block_step=self.block_step,
            total_step=self.total_step,
            block=self.block,
            start=start,
            stop=self._behind(),
            before=self.before,
            refreshed=self.refreshed,
            open=self.masked,
            tokens=self.tokens,
            fed=self.fed,
            upcoming=self.upcoming,
            row_ids=self.row_ids,
            memory=self.cache_memory,
        )

    def _note_fed(self, part: Part) -> None:
        """Remembers what the columns of a forward were fed as."""
        assert self.fed is not None
        rows = torch.arange(len(self.fed), device=self.fed.device) if part.rows is None else part.rows
        columns = part.columns if isinstance(part.columns, Tensor) else part.index(self.tokens)
        self.fed = self.fed.index_put((rows[:, None], columns), self.tokens[rows[:, None], columns])

    def _forward(self, part: Part, wanted: Tensor) -> tuple[Scores, dict[str, Tensor]]:
        """One forward; values of wanted slots, and of the shadow's, in row-major order."""
        shadow, store = part.shadow, self.store
        score = part.slots_of(wanted, self.width)  # [r, q]
        feed = score.shape[1]
        if shadow is not None:
            score = torch.cat([score, shadow.scored], dim=1)
        places = part.scores(score, feed, self.width)
        tokens, positions = part.of(self.tokens), part.of(self.positions)  # [r, q]
        keys = part.rows_of(self.keys)[:, : part.seen] if store is not None else part.of(self.keys)
        sight = self._sight(part)
        if self.guided:  # every row a second time, without its prompt
            prompt = (part.index(self.tokens) < self.width) & part.of(self.keys)
            tokens = torch.cat([tokens, torch.where(prompt, self.spec.mask_token_id, tokens)])
            positions, keys = positions.repeat(2, 1), keys.repeat(2, 1)
            sight = None if sight is None else Sight(sight.places.repeat(2, 1), sight.horizons.repeat(2, 1))
        extra: dict[str, Any] = {}
        if store is not None:
            rows, columns = part.rows, part.columns
            if self.guided:
                rows = None if rows is None else torch.cat([rows, rows + len(self.slot)])
                columns = columns.repeat(2, 1) if isinstance(columns, Tensor) else columns
            self._place(rows, columns, part.seen)
            extra["past_key_values"] = store
        shared = self._shared(part)
        if shared is not None:  # one row of each group is fed, and what is made of it counts for all
            first, like = self._twice(*shared) if self.guided else shared
            tokens, positions, keys = tokens[first], positions[first], keys[first]
            sight = None if sight is None else Sight(sight.places[first], sight.horizons[first])
            extra["score_rows"] = like
            if store is not None:
                store.share(first, like)
        if shadow is not None:
            copies = 1 + self.guided
            tokens = torch.cat([tokens, torch.full_like(shadow.slots.repeat(copies, 1), self.spec.mask_token_id)], 1)
            sight = shadow.sight(self.width, feed, copies)
            beside = self.positions.gather(-1, shadow.slots + self.width).repeat(copies, 1)
            positions, keys = torch.cat([positions, beside], 1), torch.cat([keys, shadow.real.repeat(copies, 1)], 1)
        if self.schedule.inputs is not None:
            extra["inputs_embeds"] = self._soft_inputs(tokens)
        mask = None
        if sight is not None or self.padded:
            implementation = self.model.config._attn_implementation
            mask = attention_mask(keys, tokens.shape[1], implementation, self.model.dtype, sight)
        if self.schedule.reads_states:
            extra["score_states"] = self.masked.shape[1]
        if self.in_step is not None:
            self.in_step(True)
        flat = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            score_positions=places.at,
            score_cfg_scale=self.config.cfg_scale,
            score_reduce=self._reduction(places),
            score_reduce_sees_own=True,
            **extra,
        )
        if self.schedule.reads_states:
            *flat, self.states = flat
        each = 1 + self.guided
        if part.rows is None:
            self.nfe = self.nfe + each
        else:
            self.nfe = self.nfe.index_add(0, part.rows, torch.full_like(part.rows, each))
        names = (*Drawn._fields, *self.reads, *([SHADOW] if shadow is not None else []))
        return places, dict(zip(names, flat, strict=True))

    def _shared(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """Rows of a forward that begin with the same prompt: long `[u]`, one of each group, and long `[r]`, which of
        these each row is like; None where no two are alike."""
        if not any(self.blank):
            return None
        rows = list(range(len(self.prompts))) if part.rows is None else part.rows.tolist()
        alike: dict[tuple[int, ...] | int, int] = {}
        first: list[int] = []
        copies = []
        for place, row in enumerate(rows):
            key = tuple(self.prompts[row]) if self.blank[row] else -1 - row
            if key not in alike:
                alike[key] = len(first)
                first.append(place)
            copies.append(alike[key])
            self.blank[row] = False
        if len(first) == len(rows) or part.shadow is not None or self.schedule.inputs is not None:
            return None
        device = self.slot.device
        return torch.tensor(first, device=device), torch.tensor(copies, device=device)

    @staticmethod
    def _twice(first: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
        """The same for rows that are followed by their copies without a prompt."""
        return torch.cat([first, first + len(copies)]), torch.cat([copies, copies + len(first)])

    def _place(self, rows: Tensor | None, columns: Tensor | slice, seen: int | None) -> None:
        """Where the store writes and what it sees; rows behind the last one are the copies without a prompt."""
        assert self.store is not None
        self.store.place(rows, columns, seen)

    def _sight(self, part: Part) -> Sight | None:
        """Who of the fed columns sees which keys; None: all see all."""
        if self.spec.attention == "full":
            return None
        positions, lengths = part.rows_of(self.positions), part.rows_of(self.prompt_lengths)
        start = self._block_start()
        masked = part.rows_of(self.tokens) == self.spec.mask_token_id
        whole = one_copy(self.spec, positions, lengths, lengths + part.rows_of(start), masked)
        assert whole is not None
        index = part.index(self.tokens)
        if self.store is None:
            return whole.at(index, index)
        sight = whole.at(index)
        return Sight(sight.places[:, : part.seen], sight.horizons)

    def _soft_inputs(self, tokens: Tensor) -> Tensor:
        """Embeddings `[f, q, D]` of whole rows, with those of the canvas as the schedule wants them."""
        assert self.schedule.inputs is not None
        embeddings = self.model.get_input_embeddings()(tokens)
        copies = len(tokens) // len(self.slot)
        canvas = CanvasInput(embeddings[: len(self.slot), self.width :], self.masked, self.total_step, self.memory)
        soft = self.schedule.inputs(canvas).to(embeddings.dtype)
        return torch.cat([embeddings[:, : self.width], soft.repeat(copies, 1, 1)], dim=1)

    def _reduction(self, at: Scores) -> Callable[[Tensor, slice, Tensor], tuple[Tensor, ...]]:
        """What is made of logits `[c, V]`: candidates and readings."""
        config, mask = self.config, self.spec.mask_token_id
        entropy = "entropy" in config.record or self.schedule.reads_entropy
        row = at.rows
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
            drawn = scored.drawn(entropy=entropy)
            read = [reading(scored) for reading in self.reads.values()]
            if self.schedule.shadow:
                read.append(scored.log_probs.gather(-1, here.held[:, None]).squeeze(-1))
            return (*drawn, *read)

        return in_parts(reduce)

    def _adjusted(self, logits: Tensor, places: Places) -> Tensor:
        """Logits after the options that change the model's distribution."""
        return adjusted(logits, self.config, self.spec.eos_token_ids, self.masked.sum(-1)[places.rows])

    def _banned(self, logits: Tensor, places: Places) -> Tensor | None:
        """bool `[c, V]`, tokens that may not be drawn at their slot; None if there are none."""
        found = banned(logits, self.config, self.spec.eos_token_ids, places.positions)
        if self.choices is None:
            return found
        index = self.choice[places.rows, places.positions]
        others = ~self.choices.sets[index.clamp(min=0)] & (index >= 0)[:, None]
        return others if found is None else found | others

    def _shadow(self) -> Shadow:
        start, stop = self.start, self.stop
        slots = start[:, None] + torch.arange(int((stop - start).max()), device=start.device)
        real = slots < stop[:, None]
        slots = slots.clamp(max=self.masked.shape[1] - 1)
        held = ~self.masked.gather(-1, slots) & ~self.locked.gather(-1, slots)
        return Shadow(slots, real, real & held)
