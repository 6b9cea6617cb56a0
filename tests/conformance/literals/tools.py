"""What literal samplers have in common: the references' forwards, their top-k and the rules that many deviate by."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from rl4dlm.rollout.schedules.parts import top
from tests.conformance.denoisers import denoiser, spec_of
from tests.conformance.samplers import Recorded

IDLE_STEPS = "a step at which nothing is left to write costs the reference a forward"
LOCKSTEP = "rows of a reference's batch wait for the slowest row at the end of a block"
MASK_IN_PROMPT = (
    "the reference writes mask tokens of the prompt, because masked means 'holds the mask id'; refused here"
)
MASK_DRAWN = "the reference may draw the mask token, which leaves the slot masked; it is no candidate here"
TIES = "among equal scores the reference's topk takes any; here the lower position goes first"


class Forwards:
    """The references' forwards: whole rows with the recorded attention mask, guidance, and the prefix cache.

    Logits are those that predict the position they are at, also where the model predicts the next one.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.model, self.guidance = denoiser(recorded.case), recorded.guidance
        self.mask, self.shift = recorded.mask, spec_of(recorded.case).logit_shift
        self.keys = torch.cat([recorded.keys, torch.ones(len(recorded.keys), recorded.length).bool()], dim=1)
        written = torch.zeros(len(recorded.keys), recorded.length).bool()
        self.prompt = torch.cat([recorded.prompts != self.mask, written], dim=1)  # hidden from the unconditional copy
        self.cache = DynamicCache()

    def __call__(self, ids: Tensor, low: int = 0, cached: bool = False) -> Tensor:
        """Logits `[B, T, V]`; before `low` they are undefined in a cached step."""
        if cached:
            self.cache.crop(low - self.cache.get_seq_length())
            logits = self._forward(ids[:, low:], self.keys, low, past_key_values=self.cache)
            return torch.cat([logits.new_zeros(len(ids), low, logits.shape[-1]), logits], dim=1)
        self.cache = DynamicCache()
        logits = self._forward(ids, self.keys, 0, past_key_values=self.cache)
        if self.guidance:
            other = self._forward(torch.where(self.prompt, self.mask, ids), self.keys, 0)
            logits = other + (self.guidance + 1) * (logits - other)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.shift else logits

    def _forward(self, ids: Tensor, keys: Tensor, start: int, **kwargs: DynamicCache) -> Tensor:
        mask = keys[:, None, None, : start + ids.shape[1]].expand(-1, 1, ids.shape[1], -1)
        positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache="past_key_values" in kwargs, **kwargs
        ).logits


def best(scores: Tensor, eligible: Tensor, counts: Tensor, *, deviations: bool, rules: set[str]) -> Tensor:
    """bool `[B, T]`, the best `counts` `[B]` of each row: ours break ties by position, the references' `topk` as it
    likes, which is noted in `rules` where it matters. Scores are -inf where nothing is eligible."""
    ours = top(scores, eligible, counts)
    if not deviations:
        return ours
    theirs = torch.zeros_like(eligible)
    for row, count in enumerate(counts.tolist()):
        theirs[row, scores[row].topk(count).indices] = True
    if not torch.equal(theirs & eligible, ours):
        rules.add(TIES)
    return theirs


def at(values: list[Tensor], forward: int) -> Tensor:
    """The noise of a forward; the last there is where a sampler makes more than the reference did."""
    return values[min(forward, len(values) - 1)]


def padded(values: Tensor, ids: Tensor) -> Tensor:
    """Recorded values `[B, n, …]` of the last n positions as `[B, T, …]`; a cached step has none for what precedes."""
    missing = ids.shape[1] - values.shape[1]
    return torch.cat([values.new_zeros(len(ids), missing, *values.shape[2:]), values], dim=1)


def blank(recorded: Recorded) -> Tensor:
    """long `[B, T]`: the prompts and a canvas of mask tokens."""
    return torch.cat(
        [recorded.prompts, recorded.prompts.new_full((len(recorded.prompts), recorded.length), recorded.mask)], dim=1
    )
