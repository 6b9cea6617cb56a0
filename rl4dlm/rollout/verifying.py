"""A second forward inside a step: the drafted block from left to right, as the model says it one token after another.

For schedules that check what they draft (S2D2). The block is fed once more, its open slots filled with the candidates,
each token of it seeing those before it; beside it stand as many mask tokens, the i-th of which sees what precedes slot
i and itself. What the model predicts there is q_i, its distribution of token i given all tokens before it; p_i is that
which the candidate is from. From the first open slot on, as far as open slots follow each other, candidates are kept
while u < q_i(x_i) / p_i(x_i); where one is not, a token is drawn from the part of q_i that exceeds p_i, and the rest of
the block stays as it was.

Models with full attention are asked likewise, what precedes the block seeing itself alone; that is no state which they
were trained for.

Candidates that are drawn from p_i are thereby kept or replaced so that every token written is one drawn from q_i
(speculative sampling, arXiv 2211.17192). That is what is recorded of it, whichever of the two it was; at temperature 0
candidates are the most probable tokens, and no such thing is so.

Distributions p and q of the open slots of a block are held for the time of a step, V numbers for each slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import Sight, attention_mask, one_copy
from rl4dlm.rollout.drawing import Places, Scored, in_parts
from rl4dlm.rollout.noise import inverse_cdf
from rl4dlm.rollout.schedules.parts import KEPT_BY_CHECK, RATIO, Step, first_run
from rl4dlm.rollout.step import Batch

_PROPOSED = "proposed"


class VerifiedBatch(Batch):
    """Rows some of whose drafts are checked before anything is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._proposed = _Distributions()
        super().__init__(*args, **kwargs)
        self.reads[_PROPOSED] = self._remember

    def _remember(self, scored: Scored) -> Tensor:
        """A reading that keeps what candidates are drawn from, and says nothing."""
        self._proposed.add(scored.places, scored.sampling)
        return torch.zeros_like(scored.logits[:, 0])

    def _look(self) -> Step:
        assert self.schedule.verify is not None
        self._proposed = _Distributions()
        step = super()._look()
        kept = torch.zeros_like(step.masked)
        ratio = torch.full(step.masked.shape, -1.0, dtype=torch.float64, device=kept.device)
        rows = (self.schedule.verify(step) & step.eligible.any(-1)).nonzero().squeeze(-1)
        if len(rows):
            self._check(step, rows, kept, ratio)
        self._proposed = _Distributions()
        others = {name: value for name, value in step.read.items() if name != _PROPOSED}
        step.read = {**others, KEPT_BY_CHECK: kept, RATIO: ratio}
        return step

    def _check(self, step: Step, rows: Tensor, kept: Tensor, ratio: Tensor) -> None:
        """Puts what is kept of some rows, bool `[R, W]`, and the ratios in place, and tokens into the candidates."""
        run = first_run(step.eligible)
        there = torch.zeros_like(run).index_put((rows,), run[rows])
        row, slot = there.nonzero(as_tuple=True)  # the order in which `_told` has them
        found = self._told(step, rows, there)
        draft = step.drawn.token[row, slot]
        log_p = self._proposed.at(row, slot).gather(-1, draft[:, None]).squeeze(-1)
        log_q = found.sampling.gather(-1, draft[:, None]).squeeze(-1)
        ratio[row, slot] = (log_q.double() - log_p.double()).exp().clamp(max=1.0)
        uniform = step.noise.uniform("accept", step.row_ids[row], step.total_step[row], slot)
        refused = torch.zeros_like(there).index_put((row, slot), uniform >= ratio[row, slot])
        before = refused.cumsum(-1) - refused.long()
        kept |= there & (before == 0)  # up to and including the first that is refused
        first = refused & (before == 0)
        token, sampling = draft.clone(), log_q
        replaced = first[row, slot].nonzero().squeeze(-1)
        if len(replaced):
            where = row[replaced], slot[replaced]
            q, p = found.sampling[replaced].double().exp(), self._proposed.at(*where).double().exp()
            rest = (q - p).clamp(min=0)
            rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, q)
            drawn = step.noise.uniform("residual", step.row_ids[where[0]], step.total_step[where[0]], where[1])
            token[replaced] = inverse_cdf(rest, drawn)
            sampling = found.sampling.gather(-1, token[:, None]).squeeze(-1)
        if not self.config.temperature > 0:
            sampling = torch.zeros_like(sampling)
        here = kept[row, slot]
        values = {
            "token": token,
            "confidence": found.whole.gather(-1, token[:, None]).squeeze(-1).exp(),
            "raw_log_prob": found.own.gather(-1, token[:, None]).squeeze(-1),
            "log_prob": sampling,
            "entropy": found.entropy,
        }
        index = row[here], slot[here]
        step.drawn = step.drawn._replace(
            **{
                name: getattr(step.drawn, name).index_put(index, value[here].to(getattr(step.drawn, name).dtype))
                for name, value in values.items()
            }
        )

    def _told(self, step: Step, rows: Tensor, wanted: Tensor) -> _Found:
        """q at wanted slots, bool `[R, W]`, of these rows, in row-major order."""
        width, size, device = self.width, self.masked.shape[1], rows.device
        begin = width + self._block_start()[rows]  # [r], in the prompt where the block starts there
        stop, start = self.stop[rows], self.start[rows]
        end = width + stop
        canvas = torch.where(self.eligible, step.drawn.token, step.tokens)
        filled = torch.cat([self.tokens[:, :width], canvas], dim=1)[rows]
        first = begin if self.store is not None else torch.zeros_like(begin)
        columns = first[:, None] + torch.arange(int((end - first).max()), device=device)  # [r, q]
        columns = torch.minimum(columns, end[:, None] - 1)
        slots = start[:, None] + torch.arange(int((stop - start).max()), device=device)  # [r, s]
        beside = slots < stop[:, None]
        slots = slots.clamp(max=size - 1)
        seen = int(end.max())
        positions, keys = self.positions[rows], self.keys[rows]
        mine = positions.gather(-1, columns)
        theirs = positions.gather(-1, slots + width)
        sight = self._sight_of(rows, columns, begin, mine, theirs, slots + width, seen)
        queries, implementation = columns.shape[1] + slots.shape[1], self.model.config._attn_implementation
        keys = torch.cat([keys[:, :seen], beside], dim=1)
        mask = attention_mask(keys, queries, implementation, self.model.dtype, sight)
        extra: dict[str, Any] = {}
        if self.store is not None:
            self.store.place(rows, columns, seen, beside=slots.shape[1])
            extra["past_key_values"] = self.store
        if self.in_step is not None:
            self.in_step(True)
        score = wanted[rows].gather(-1, slots) & beside
        at, place = score.nonzero(as_tuple=True)
        chosen = slots[at, place]
        places = Places(
            rows=rows[at],
            positions=chosen,
            held=torch.full_like(chosen, self.spec.mask_token_id),
            row_ids=self.row_ids[rows[at]],
            steps=self.total_step[rows[at]],
            noise=self.noise,
            memory=self.memory,
        )
        masks = torch.full_like(slots, self.spec.mask_token_id)
        flat = self.model(
            input_ids=torch.cat([filled.gather(-1, columns), masks], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([mine, theirs], dim=1),
            score_positions=(at, columns.shape[1] + place),
            score_cfg_scale=0.0,
            score_reduce=self._distributions(places),
            score_reduce_sees_own=True,
            **extra,
        )
        self.nfe = self.nfe.index_add(0, rows, torch.ones_like(rows))
        return _Found(*flat)

    def _sight_of(
        self, rows: Tensor, columns: Tensor, begin: Tensor, mine: Tensor, theirs: Tensor, stand_for: Tensor, seen: int
    ) -> Sight:
        """Before the block as the model sees, in it from left to right; a mask sees what precedes its slot, and itself.

        Args:
            columns: long `[r, q]`, what is fed of each row. begin: long `[r]`, the column at which the block starts.
            mine, theirs: positions of these columns, and of the masks. stand_for: long `[r, s]`, the masks' columns.
        """
        positions, lengths = self.positions[rows], self.prompt_lengths[rows]
        whole = one_copy(self.spec, positions, lengths, lengths + self._block_start()[rows])
        if whole is None:  # what precedes the block must not see it: the drafts would tell of themselves
            own = positions.gather(-1, begin[:, None]).expand_as(columns)
        else:
            own = whole.horizons.gather(-1, columns)
        horizons = torch.cat([torch.where(columns >= begin[:, None], mine + 1, own), theirs + 1], dim=1)  # [r, q + s]
        places = torch.cat([positions[:, :seen], theirs], dim=1)  # [r, seen + s]
        fed, masks = columns.shape[1], theirs.shape[1]
        unseen = torch.zeros(len(rows), fed + masks, seen + masks, dtype=torch.bool, device=rows.device)
        unseen[:, :, seen:] = True  # nothing sees a mask but itself
        itself = torch.arange(masks, device=rows.device)
        unseen[:, fed + itself, seen + itself] = False
        unseen[:, fed:, :seen] = torch.arange(seen, device=rows.device) == stand_for[..., None]
        return Sight(places=places, horizons=horizons, unseen=unseen)

    def _distributions(self, places: Places) -> Any:
        """What is made of logits `[c, V]` of the masks."""

        def reduce(logits: Tensor, part: slice, own: Tensor) -> tuple[Tensor, ...]:
            here = places.at(part)
            adjusted = self._adjusted(logits, here)
            scored = Scored(
                logits=adjusted,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                mask_token_id=self.spec.mask_token_id,
                banned=self._banned(adjusted, here),
                places=here,
                model_logits=adjusted,
                own_logits=own,
            )
            return scored.sampling, scored.log_probs, scored.own_log_probs, scored.entropy

        return in_parts(reduce)


class _Found:
    """q of n slots."""

    def __init__(self, sampling: Tensor, whole: Tensor, own: Tensor, entropy: Tensor) -> None:
        self.sampling, self.whole, self.own, self.entropy = sampling, whole, own, entropy


class _Distributions:
    """Log-probabilities that candidates are drawn from, of open slots."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, places: Places, sampling: Tensor) -> None:
        """Those of some slots."""
        self._rows.append(places.rows)
        self._slots.append(places.positions)
        self._values.append(sampling)

    def at(self, rows: Tensor, slots: Tensor) -> Tensor:
        """`[n, V]`, of slots that have been added."""
        key = torch.cat(self._rows) * (1 << 32) + torch.cat(self._slots)
        order = key.argsort()
        found = order[torch.searchsorted(key[order], rows * (1 << 32) + slots)]
        return torch.cat(self._values)[found]
