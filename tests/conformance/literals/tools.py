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
    """The references' forwards: whole rows with the recorded attention mask and guidance, or some of their columns
    against stored keys and values of the others.

    Logits are those that predict the position they are at, also where the model predicts the next one.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.model, self.guidance = denoiser(recorded.case), recorded.guidance
        self.mask, self.shift = recorded.mask, spec_of(recorded.case).logit_shift
        self.keys = torch.cat([recorded.keys, torch.ones(len(recorded.keys), recorded.length).bool()], dim=1)
        written = torch.zeros(len(recorded.keys), recorded.length).bool()
        self.prompt = torch.cat([recorded.prompts != self.mask, written], dim=1)  # hidden from the unconditional copy
        self.stored: list[tuple[Tensor, Tensor]] = []  # per layer, of every column; [B, heads, T, head_dim]

    def __call__(self, ids: Tensor, low: int = 0, cached: bool = False, high: int | None = None) -> Tensor:
        """Logits `[B, T, V]`; a cached step feeds columns `low` to `high` and leaves the others undefined."""
        at = torch.arange(ids.shape[1])
        return self.part(ids, (at >= low) & (at < (high or len(at))) if cached else at >= 0)

    def part(self, ids: Tensor, fed: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` of a forward of the columns `fed`, bool `[T]`; elsewhere they are minus infinity.

        Of what is fed it stores the columns `keep`, bool `[T]`; None: all of them.
        """
        columns, others = fed.nonzero()[:, 0], (~fed).nonzero()[:, 0]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.stored if len(others) else ()):
            cache.update(keys[:, :, others], values[:, :, others], layer)
        seen = self.keys[:, torch.cat([others, columns])]
        logits = self._forward(ids[:, columns], seen, columns, past_key_values=cache)
        kept = (fed if keep is None else fed & keep)[columns]
        for layer, filled in enumerate(cache.layers):
            fresh = [tensor[:, :, len(others) :] for tensor in (filled.keys, filled.values)]
            if layer == len(self.stored):
                self.stored.append(tuple(f.new_zeros(*f.shape[:2], len(fed), f.shape[3]) for f in fresh))
            for stored, new in zip(self.stored[layer], fresh, strict=True):
                stored[:, :, columns[kept]] = new[:, :, kept]
        if self.guidance and not len(others):
            other = self._forward(torch.where(self.prompt, self.mask, ids), self.keys, columns)
            logits = other + (self.guidance + 1) * (logits - other)
        whole = logits.new_full((*ids.shape, logits.shape[-1]), -torch.inf)
        whole[:, columns] = logits
        return torch.cat([whole[:, :1], whole[:, :-1]], dim=1) if self.shift else whole

    def _forward(self, ids: Tensor, keys: Tensor, columns: Tensor, **kwargs: DynamicCache) -> Tensor:
        mask = keys[:, None, None].expand(-1, 1, ids.shape[1], -1)
        positions = columns.expand_as(ids)
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


def padded(values: Tensor, ids: Tensor, stop: int | None = None) -> Tensor:
    """Recorded values `[B, n, …]` of the n positions before `stop` as `[B, T, …]`; a cached step has no others."""
    behind = ids.shape[1] - (stop or ids.shape[1])
    before = max(0, ids.shape[1] - behind - values.shape[1])
    parts = [values.new_zeros(len(ids), n, *values.shape[2:]) for n in (before, behind)]
    return torch.cat([parts[0], values, parts[1]], dim=1)[:, : ids.shape[1]]


def blank(recorded: Recorded) -> Tensor:
    """long `[B, T]`: the prompts and a canvas of mask tokens."""
    return torch.cat(
        [recorded.prompts, recorded.prompts.new_full((len(recorded.prompts), recorded.length), recorded.mask)], dim=1
    )
