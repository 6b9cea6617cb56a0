"""The references' samplers with their deviations from ours as switches, to prove that these explain every difference.

`literal(recorded)` does what the released code does and must give the record; `literal(recorded, deviations=False)`
does what we do and must give what the engine gives. Where the two differ, the rules below are the only reason.
The logits come from the model's own forward, not through the library's scoring or caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from rl4dlm.rollout.schedules.parts import even_counts, top
from tests.conformance.denoisers import denoiser, spec_of
from tests.conformance.samplers import Recorded, Run, gumbel, recorded_noise

IDLE_STEPS = "a step at which nothing is left to write costs the reference a forward"
FULL_BLOCK = "with prefix cache the reference runs one more forward in a block that its first step has filled"
LOCKSTEP = "rows of a reference's batch wait for the slowest row at the end of a block"
MASK_IN_PROMPT = (
    "the reference writes mask tokens of the prompt, because masked means 'holds the mask id'; refused here"
)
MASK_DRAWN = "the reference may draw the mask token, which leaves the slot masked; it is no candidate here"
EOS_CONFIDENCE = (
    "confidence_eos_eot_inf edits the reference's logits: at temperature 0 the softmax is renormalised without both "
    "tokens and their confidence is 0, above that only end-of-turn is taken out; here both are deferred"
)


@dataclass
class Literal:
    """What the literal sampler did."""

    ids: Tensor  # long [B, T]
    forwards: list[Tensor] = field(default_factory=list)  # long [B, n] each, what was fed
    states: list[Tensor] = field(default_factory=list)  # long [B, T] each, the rows before each forward
    wrote: list[Tensor] = field(default_factory=list)  # bool [B] each, whether the forward had anything to write
    rules: set[str] = field(default_factory=set)

    def working(self) -> Run:
        """Row by row, without the forwards that had nothing to write."""
        states = [
            [state[row] for state, wrote in zip(self.states, self.wrote, strict=True) if wrote[row]]
            for row in range(len(self.ids))
        ]
        return Run(self.ids, states, [len(row) for row in states])


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    """The recorded sampler; with `deviations=False` without the rules that change what is written."""
    settings, spec = recorded.case.settings, spec_of(recorded.case)
    width, length, mask = recorded.prompts.shape[1], recorded.length, spec.mask_token_id
    ids = torch.cat([recorded.prompts, recorded.prompts.new_full((len(recorded.prompts), length), mask)], dim=1)
    open_slots = torch.arange(width + length).expand_as(ids) >= width  # what "masked" means without the deviations
    confident_eos = settings.get("confidence_eos_eot_inf")
    result = Literal(ids)
    if deviations and confident_eos:
        result.rules.add(EOS_CONFIDENCE)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    tokens, order = recorded_noise(recorded)
    model = _Model(recorded)
    for low in range(width, width + length, recorded.block_length):
        high = low + recorded.block_length
        masked_at_start = ((ids == mask) if deviations else open_slots)[:, low:high].sum(-1)
        step = 0
        while True:
            masked = (ids == mask) if deviations else open_slots
            eligible = masked.clone()
            eligible[:, high:] = False
            counts = even_counts(masked_at_start, recorded.steps_per_block, torch.tensor(step))
            wrote = eligible.any(-1) if recorded.threshold is not None else eligible.any(-1) & (counts > 0)
            cached = step > 0 and recorded.case.cache == "prefix"
            if cached:  # the reference looks at the block and what follows only
                eligible[:, :low] = False
            result.states.append(ids.clone())
            result.forwards.append(ids[:, low if cached else 0 :].clone())
            result.wrote.append(wrote)
            logits, forward = model(ids, low, cached), len(result.forwards) - 1

            if settings.get("logits_eos_inf"):
                logits[..., list(spec.eos_token_ids)] = -torch.inf
            noised = logits.clone()
            if recorded.temperature:
                noised += recorded.temperature * _padded(gumbel(_at(tokens, forward)), ids)
            if not deviations:
                noised[..., mask] = -torch.inf
            drawn = noised.argmax(-1)
            if bool(((drawn == mask) & eligible).any()):
                result.rules.add(MASK_DRAWN)
            if confident_eos and deviations:
                logits[..., recorded.eot] = -torch.inf
                if not recorded.temperature:
                    logits[..., list(spec.eos_token_ids)] = -torch.inf
            confidence = logits.double().softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
            if recorded.random:
                confidence = _padded(_at(order, forward), ids)
            if confident_eos and not deviations:
                confidence[torch.isin(drawn, torch.tensor((*spec.eos_token_ids, recorded.eot)))] = -torch.inf
            confidence = confidence.masked_fill(~eligible, -torch.inf)

            if recorded.threshold is None:
                commit = _best(confidence, eligible, counts, deviations)
            else:
                best = _best(confidence, eligible, eligible.any(-1).long(), deviations)
                commit = eligible & (confidence >= recorded.threshold) | best
            ids[commit] = torch.where(eligible, drawn, ids)[commit]
            open_slots = open_slots & ~commit
            step += 1
            if recorded.runs_all_steps:
                if step == recorded.steps_per_block:
                    break
            else:
                left = ((ids == mask) if deviations else open_slots)[:, low:high]
                if not bool(left.any()) and step >= (2 if recorded.case.cache == "prefix" else 1):
                    break
    if not all(bool(wrote.all()) for wrote in result.wrote):
        prefix = recorded.case.cache == "prefix"
        result.rules.add(IDLE_STEPS if recorded.runs_all_steps else FULL_BLOCK if prefix else LOCKSTEP)
    return result


class _Model:
    """The references' forwards: whole rows with the recorded attention mask, guidance, and the prefix cache."""

    def __init__(self, recorded: Recorded) -> None:
        self.model, self.guidance = denoiser(recorded.case), recorded.guidance
        self.mask = spec_of(recorded.case).mask_token_id
        self.keys = torch.cat([recorded.keys, torch.ones(len(recorded.keys), recorded.length).bool()], dim=1)
        written = torch.zeros(len(recorded.keys), recorded.length).bool()
        self.prompt = torch.cat([recorded.prompts != self.mask, written], dim=1)  # hidden from the unconditional copy
        self.cache = DynamicCache()

    def __call__(self, ids: Tensor, low: int, cached: bool) -> Tensor:
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
        return logits

    def _forward(self, ids: Tensor, keys: Tensor, start: int, **kwargs: DynamicCache) -> Tensor:
        mask = keys[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache="past_key_values" in kwargs, **kwargs
        ).logits


def _best(confidence: Tensor, eligible: Tensor, counts: Tensor, deviations: bool) -> Tensor:
    """The most confident: ours breaks ties by position, the references' `topk` as it likes."""
    if not deviations:
        return top(confidence, eligible, counts)
    commit = torch.zeros_like(eligible)
    for row, count in enumerate(counts.tolist()):
        commit[row, confidence[row].topk(count).indices] = True
    return commit


def _at(values: list[Tensor], forward: int) -> Tensor:
    return values[min(forward, len(values) - 1)]


def _padded(values: Tensor, ids: Tensor) -> Tensor:
    """Recorded values `[B, n, …]` of the last n positions as `[B, T, …]`; a cached step has none for what precedes."""
    missing = ids.shape[1] - values.shape[1]
    return torch.cat([values.new_zeros(len(ids), missing, *values.shape[2:]), values], dim=1)
