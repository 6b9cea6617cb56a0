"""Block refinement that also takes out and puts in slots (LLaDA2.2's Levenshtein editing).

Two tokens of the vocabulary are no text but edits. Where one is the candidate of a slot that is written or replaced,
the slot is taken out (`delete_token_id`), or an open one goes in before it and what it held stays (`insert_token_id`).
A block keeps its length: what is missing at its end is filled with open slots, what is too much is cut off.

Each step writes all candidates above `threshold` if these are enough, else the best: one more than there are open slots
that were put in since the block was entered, so that one that was open then is always among them. When none of those is
left, all open slots are written. Every written token of the block whose candidate is another one, with a probability
above `editing_threshold`, is replaced. A step without a candidate to write or replace ends the block, and so does the
last one that is allowed: `max_post_steps` with none of the first open slots left, or `max_post_steps` more than the
block has slots in all. In this last step the two edits are no candidates. A step that begins with a state that the
block has been in before takes, in the slot that it is least sure of, the best token that was not taken there yet.

After the report of LLaDA2.2 (inclusionAI, 2026) and the decoder of SGLang (`JointThresholdInDel`). Differences: the
mask token is no candidate anywhere (there it may stand again in slots that were put in); probabilities of the last step
are those without the two edits; tokens taken at a slot are remembered with what moves, not by place; `max_post_steps`
is at least 1; candidates may be drawn at a temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.drawing import Drawn, Places, Scored, lowest_argmax
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.dream import candidate_probability, certainty
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Edits, Schedule, Step, best, top
from rl4dlm.rollout.schedules.registry import register

IDS = ("delete_token_id", "insert_token_id")
# Of each slot: open when the block was entered; chosen in this step; tokens taken there, plus one, by step.
ORIGINAL, CHOSEN, TAKEN = "levenshtein_original", "levenshtein_chosen", "levenshtein_taken"
# Of each row: whether any is chosen; steps without first open slots; whether the next step is the last, and whether its
# state is known; states so far.
BUSY, POST = "levenshtein_busy", "levenshtein_post"
LAST, KNOWN, SEEN = "levenshtein_last", "levenshtein_known", "levenshtein_seen"


@dataclass(frozen=True)
class LevenshteinArguments:
    """Settings of `levenshtein`.

    Args:
        delete_token_id, insert_token_id: what the model was taught to write for an edit, `delete_token_id` and
            `split_token_id` in LLaDA2.2's `config.json` (156930 and 156931).
        threshold: candidates whose probability exceeds it fill open slots, if they are enough.
        editing_threshold: candidates whose probability exceeds it replace written tokens; 1 or more: none does.
        max_post_steps: steps of a block with none of its first open slots left.
    """

    delete_token_id: int | None = None
    insert_token_id: int | None = None
    threshold: float = 0.5
    editing_threshold: float = 0.0
    max_post_steps: int = 16

    def __post_init__(self) -> None:
        for name in IDS:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}=None is not allowed; it must be the id of the token that the model was taught to write "
                    "for it, as its config.json says"
                )
            check_count(self, name, 0)
        if self.delete_token_id == self.insert_token_id:
            raise ValueError(
                f"insert_token_id={self.insert_token_id} is not allowed; it must not be delete_token_id, which is the "
                "same"
            )
        check_number(self, "threshold", 0)
        check_number(self, "editing_threshold", 0)
        check_count(self, "max_post_steps", 1)


@register("levenshtein", LevenshteinArguments, takes_steps=False)
def levenshtein(arguments: LevenshteinArguments, config: Any) -> Schedule:
    """Fills a block, corrects it, and makes it shorter and longer inside."""
    if config.min_new_tokens:
        raise ValueError(
            f"min_new_tokens={config.min_new_tokens} is not allowed with schedule='levenshtein', which takes out slots "
            "before an end of sequence; it must be 0"
        )
    size = config.block_length or config.canvas_length
    rules = _Rules(arguments, size + arguments.max_post_steps)
    return Schedule(
        fixed_blocks(config),
        certainty,
        rules.commit,
        propose=rules.propose,
        replace=rules.replace,
        edit=rules.edit,
        stay=rules.stay,
        scope="block",
        reads={"certainty": candidate_probability, "other": rules.other},
        transform=rules.transform,
        patience=size + arguments.max_post_steps + 1,  # the last step always writes what is open
        check=rules.check,
    )


@dataclass(frozen=True)
class _Rules:
    """What is chosen, and what becomes of it, in at most `most + 1` steps per block."""

    arguments: LevenshteinArguments
    most: int

    @property
    def ids(self) -> tuple[int, int]:
        delete, insert = self.arguments.delete_token_id, self.arguments.insert_token_id
        assert delete is not None and insert is not None
        return delete, insert

    def check(self, model: Any) -> None:
        spec, vocabulary = DiffusionSpec.of(model), model.config.get_text_config().vocab_size
        for name, token in zip(IDS, self.ids, strict=True):
            if token >= vocabulary or token == spec.mask_token_id or token in spec.eos_token_ids:
                raise ValueError(
                    f"{name}={token} is not allowed; it must be an id below {vocabulary}, the model's vocabulary, and "
                    f"neither the mask token {spec.mask_token_id} nor an end of sequence {spec.eos_token_ids}"
                )

    def transform(self, logits: Tensor, places: Places) -> Tensor:
        """Nothing is taken out or put in by the last step of a block."""
        last = places.memory.rows.get(LAST)
        if last is None:
            return logits
        logits = logits.clone()
        edits = list(self.ids)
        logits[:, edits] = logits[:, edits].masked_fill(last[places.rows][:, None], -torch.inf)
        return logits

    def other(self, scored: Scored) -> Tensor:
        """float64 `[n, 4]`: the best token that was not taken in each slot, and its numbers, ordered as in `Drawn`."""
        places = scored.places
        known, taken = places.memory.rows.get(KNOWN), places.memory.slots.get(TAKEN)
        if known is None or taken is None or not bool(known.any()):
            return torch.zeros(len(scored.logits), 4, dtype=torch.float64, device=scored.logits.device)
        before = taken[places.rows, places.positions]  # [n, S], 0 for none
        hidden = torch.zeros(len(before), scored.logits.shape[1] + 1, dtype=torch.bool, device=before.device)
        token = lowest_argmax(scored.allowed.masked_fill(hidden.scatter_(1, before, True)[:, 1:], -torch.inf))
        sources = [scored.log_probs, scored.own_log_probs, *([scored.sampling] if scored.temperature > 0 else [])]
        found = [of.gather(-1, token[:, None]).squeeze(-1).double() for of in sources]
        drawn = found[2] if len(found) > 2 else torch.zeros_like(found[0])
        return torch.stack([token.double(), found[0].exp(), found[1], drawn], dim=-1)

    def propose(self, step: Step) -> Drawn:
        """Chooses the slots of the step, and candidates, which are others in rows that have been where they are."""
        rows, slots, first = step.memory.rows, step.memory.slots, step.step == 0
        nothing = torch.zeros_like(step.masked)
        original = torch.where(first[:, None], step.eligible, slots.get(ORIGINAL, nothing))
        open_first = original & step.eligible
        filled = ~open_first.any(-1)
        last = rows.get(LAST, torch.zeros_like(first))
        rows[POST] = torch.where(first, 0, rows.get(POST, step.step)) + filled
        sure = certainty(step)
        likely = step.eligible & (sure > self.arguments.threshold)
        needed = 1 + (step.eligible & ~original).sum(-1)
        enough = likely.sum(-1) >= needed
        fill = torch.where(enough[:, None], likely, top(sure, step.eligible, needed))
        fill = torch.where((filled | last)[:, None], step.eligible, fill)
        editable = step.seen & step.written & step.inside & ~step.locked
        edits = editable & (step.drawn.token != step.tokens) & (sure > self.arguments.editing_threshold)
        slots[ORIGINAL], slots[CHOSEN] = original, fill | edits
        drawn, known = step.drawn, rows.get(KNOWN)
        if known is not None and bool(known.any()):
            drawn = self._another(step, known & ~first, fill | edits, sure)
        self._remember(step, drawn.token)
        return drawn

    @staticmethod
    def _another(step: Step, known: Tensor, chosen: Tensor, sure: Tensor) -> Drawn:
        """The candidates, another one in the chosen slot that a row is least sure of, in rows that are known."""
        doubtful = best(-sure, chosen) & known[:, None]
        other = step.read["other"]
        token = torch.where(doubtful, other[..., 0].long(), step.drawn.token)
        values = {
            name: torch.where(doubtful, other[..., place].to(value.dtype), value)
            for place, name in enumerate(("confidence", "raw_log_prob", "log_prob"), 1)
            for value in (getattr(step.drawn, name),)
        }
        return step.drawn._replace(token=token, **values)

    def _remember(self, step: Step, token: Tensor) -> None:
        """Notes the state that the step begins with, and what it takes where."""
        rows, slots, at = step.memory.rows, step.memory.slots, step.step.clamp(max=self.most)
        count = self.most + 1
        seen = rows.get(SEEN, step.step.new_zeros(len(step.step), count))
        taken = slots.get(TAKEN, step.step.new_zeros(*step.tokens.shape, count))
        first = step.step == 0
        seen, taken = seen.masked_fill(first[:, None], 0), taken.masked_fill(first[:, None, None], 0)
        rows[SEEN] = seen.scatter(1, at[:, None], _state(step.tokens, step)[:, None])
        value = torch.where(slots[CHOSEN], token + 1, 0)
        slots[TAKEN] = taken.scatter(2, at[:, None, None].expand(-1, token.shape[1], 1), value[..., None])

    def commit(self, step: Step, scores: Tensor) -> Tensor:
        last = step.memory.rows.get(LAST, torch.zeros_like(step.step, dtype=torch.bool))
        waits = (scores == -torch.inf) & ~last[:, None]  # what is deferred, until the block ends
        chosen = step.memory.slots[CHOSEN] & ~(waits & step.eligible)
        # Where all of them wait, the best of the other slots: the engine's own way out, much later, knows no edits.
        chosen = chosen | (best(scores, step.eligible) & ~chosen.any(-1, keepdim=True))
        step.memory.slots[CHOSEN], step.memory.rows[BUSY] = chosen, chosen.any(-1)
        return chosen & step.eligible & ~self._is_edit(step)

    def replace(self, step: Step, commit: Tensor) -> Tensor:
        return step.memory.slots[CHOSEN] & step.written & ~self._is_edit(step)

    def _is_edit(self, step: Step) -> Tensor:
        delete, insert = self.ids
        return (step.drawn.token == delete) | (step.drawn.token == insert)

    def edit(self, step: Step) -> Edits:
        delete, insert = (step.memory.slots[CHOSEN] & (step.drawn.token == token) for token in self.ids)
        return Edits(delete, insert)

    def stay(self, step: Step) -> Tensor:
        """Looks at what the step has made of the block: whether there is another one, and which it would be."""
        rows, slots = step.memory.rows, step.memory.slots
        last = rows.get(LAST, torch.zeros_like(step.step, dtype=torch.bool))
        more = rows[BUSY] & ~last
        filled = ~(slots[ORIGINAL] & step.masked & step.inside).any(-1)
        spent = filled & (rows[POST] + 1 >= self.arguments.max_post_steps)
        rows[LAST] = more & (spent | (step.step + 2 > self.most))
        rows[KNOWN] = more & ~rows[LAST] & (rows[SEEN] == _state(step.tokens, step)[:, None]).any(-1)
        return more


def _state(tokens: Tensor, step: Step) -> Tensor:
    """A number for what the active block holds, long `[R]`: equal for equal states, and for others by chance alone."""
    place = (step.offsets + 1) * 6364136223846793005 + 1442695040888963407  # wraps around, as products below do
    place = place * place * 2862933555777941757 + 3037000493
    return 1 + (torch.where(step.inside, tokens + 1, 0) * place).sum(-1)
