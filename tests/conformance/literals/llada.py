"""LLaDA's sampler, its copies in d1, and Fast-dLLM's: even counts, a threshold or a factor."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import Schedule, even_counts, random_order
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import (
    IDLE_STEPS,
    LOCKSTEP,
    MASK_DRAWN,
    MASK_IN_PROMPT,
    Forwards,
    at,
    best,
    blank,
    padded,
)
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise, gumbel, recorded_noise

DEFAULT_EOT = 2  # what the recorded functions' hard-coded end-of-turn id was replaced by

FULL_BLOCK = "with a cache the reference runs one more forward in a block that its first step has filled"
EOS_CONFIDENCE = (
    "confidence_eos_eot_inf edits the reference's logits: at temperature 0 the softmax is renormalised without both "
    "tokens and their confidence is 0, above that only end-of-turn is taken out; here both are deferred"
)
LAST_RANK = (
    "the factor rule's walk through the ranks, once it is at the last one, takes that one even if it fails; here the "
    "ranks before the first that fails are taken"
)


class RandomOrder(DecodingConfig):
    """What Fast-dLLM's `remasking="random"` means together with a threshold or a factor, from the library's parts."""

    def build_schedule(self) -> Schedule:
        schedule = super().build_schedule()
        assert isinstance(schedule, Schedule)
        return dataclasses.replace(schedule, confidence=random_order)


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    is_random = settings.get("remasking") == "random"
    schedule, arguments = "random" if is_random else "low_confidence", {}
    for name in ("threshold", "factor"):  # a factor goes first where both are given
        if settings.get(name) is not None:
            schedule, arguments = name, {name: settings[name]}
    return (RandomOrder if is_random and arguments else DecodingConfig)(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule=schedule,
        steps=recorded.steps_per_block * (recorded.length // recorded.block_length) if not arguments else None,
        temperature=recorded.temperature,
        cfg_scale=recorded.guidance,
        cache=recorded.case.cache,
        stop_at_eos=False,
        suppress_token_ids=recorded.eos if settings.get("logits_eos_inf") else (),
        defer_token_ids=(*recorded.eos, _eot(recorded)) if settings.get("confidence_eos_eot_inf") else (),
        schedule_args=arguments,
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    return _Noise(recorded) if recorded.case.noise else None


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    settings, mask = recorded.case.settings, recorded.mask
    threshold, factor = settings.get("threshold"), settings.get("factor")
    width, length = recorded.prompts.shape[1], recorded.length
    ids = blank(recorded)
    open_slots = torch.arange(width + length).expand_as(ids) >= width  # what "masked" means without the deviations
    confident_eos = settings.get("confidence_eos_eot_inf")
    result = Literal(ids)
    if deviations and confident_eos:
        result.rules.add(EOS_CONFIDENCE)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    tokens, order = recorded_noise(recorded)
    model = Forwards(recorded)
    for low in range(width, width + length, recorded.block_length):
        high = low + recorded.block_length
        masked_at_start = ((ids == mask) if deviations else open_slots)[:, low:high].sum(-1)
        step = 0
        while True:
            masked = (ids == mask) if deviations else open_slots
            eligible = masked.clone()
            eligible[:, high:] = False
            counts = even_counts(masked_at_start, recorded.steps_per_block, torch.tensor(step))
            wrote = eligible.any(-1) if threshold is not None or factor is not None else eligible.any(-1) & (counts > 0)
            cached = step > 0 and recorded.case.cache != "none"
            stop = high if cached and recorded.case.cache == "dual" else width + length
            if cached:  # the reference looks at the block, or at it and what follows, only
                eligible[:, :low] = False
            result.states.append(ids.clone())
            result.forwards.append(ids[:, low if cached else 0 : stop].clone())
            result.wrote.append(wrote)
            logits, forward = model(ids, low, cached, stop), len(result.forwards) - 1

            if settings.get("logits_eos_inf"):
                logits[..., list(recorded.eos)] = -torch.inf
            noised = logits.clone()
            if recorded.temperature:
                noised += recorded.temperature * padded(gumbel(at(tokens, forward)), ids, stop)
            if not deviations:
                noised[..., mask] = -torch.inf
            drawn = noised.argmax(-1)
            if bool(((drawn == mask) & eligible).any()):
                result.rules.add(MASK_DRAWN)
            if confident_eos and deviations:
                logits[..., _eot(recorded)] = -torch.inf
                if not recorded.temperature:
                    logits[..., list(recorded.eos)] = -torch.inf
            confidence = logits.double().softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
            if _is_random(recorded):
                confidence = padded(at(order, forward), ids, stop)
            if confident_eos and not deviations:
                confidence[torch.isin(drawn, torch.tensor((*recorded.eos, _eot(recorded))))] = -torch.inf
            confidence = confidence.masked_fill(~eligible, -torch.inf)

            if factor is not None:
                counts = _factor_counts(confidence, eligible, factor, deviations, result.rules)
            elif threshold is not None:
                counts = eligible.any(-1).long()
            commit = best(confidence, eligible, counts, deviations=deviations, rules=result.rules)
            if threshold is not None and factor is None:
                commit |= eligible & (confidence >= threshold)
            ids[commit] = torch.where(eligible, drawn, ids)[commit]
            open_slots = open_slots & ~commit
            step += 1
            if _runs_all_steps(recorded):
                if step == recorded.steps_per_block:
                    break
            else:
                left = ((ids == mask) if deviations else open_slots)[:, low:high]
                if not bool(left.any()) and step >= (1 if recorded.case.cache == "none" else 2):
                    break
    if not all(bool(wrote.all()) for wrote in result.wrote):
        alone = LOCKSTEP if recorded.case.cache == "none" else FULL_BLOCK
        result.rules.add(IDLE_STEPS if _runs_all_steps(recorded) else alone)
    return result


def _factor_counts(confidence: Tensor, eligible: Tensor, factor: float, deviations: bool, rules: set[str]) -> Tensor:
    """How many of the most confident go together, long `[B]`."""
    counts = []
    for row, candidates in zip(confidence, eligible, strict=True):
        count = 0
        for value in row[candidates].sort(descending=True).values.tolist():
            if count and value < 1 - factor / (count + 2):
                if deviations and count == int(candidates.sum()) - 1:
                    rules.add(LAST_RANK)
                    count += 1
                break
            count += 1
        counts.append(count)
    return torch.tensor(counts)


class _Noise(ReplayedNoise):
    """Where the reference runs steps that write nothing, a row's own steps are fewer; counted block by block."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__(recorded)
        self.entered: dict[int, list[tuple[int, int]]] = {}  # row -> (block, the row's step at its first step) so far

    def forward_of(self, row: int, step: int, position: int) -> int:
        recorded = self.recorded
        if _runs_all_steps(recorded):
            made = min(recorded.steps_per_block, recorded.block_length)
            return step // made * recorded.steps_per_block + step % made
        if recorded.case.cache == "none":
            return step
        block = position // recorded.block_length
        entered = self.entered.setdefault(row, [(block, step)])
        if entered[-1][0] != block:
            entered.append((block, step))
        starts = [first for _, first in entered]
        made_before = (after - before for before, after in itertools.pairwise(starts))
        return sum(max(2, steps) for steps in made_before) + step - starts[-1]

    def index(self, values: int, position: int) -> int:
        recorded = self.recorded
        if recorded.case.cache == "dual" and values == recorded.block_length:
            return position % values
        return super().index(values, position)


def _runs_all_steps(recorded: Recorded) -> bool:
    """Whether the reference runs a fixed number of steps per block (LLaDA, d1) or until the block is full."""
    return recorded.case.family != "fastdllm"


def _is_random(recorded: Recorded) -> bool:
    return recorded.case.settings.get("remasking") == "random"


def _eot(recorded: Recorded) -> int:
    return recorded.case.settings.get("eot_id", DEFAULT_EOT)


def check_counts(case: Case) -> None:
    """LLaDA's table of counts."""
    assert case.outputs["table"]
    for entry in case.outputs["table"]:
        masked, steps = torch.tensor(entry["masked"]).view(-1), entry["steps"]
        counts = torch.stack([even_counts(masked, steps, torch.tensor(s)) for s in range(steps)], dim=1)
        assert torch.equal(counts, torch.tensor(entry["counts"]).view(len(masked), -1)), entry


def made_up(seed: int) -> Recorded:
    """A case of any of the samplers, the seeds taking turns."""
    rng, generator = random.Random(f"llada {seed}"), torch.Generator().manual_seed(seed)
    kind = ("llada", "d1", "fastdllm", "fastdllm_prefix", "fastdllm_factor", "fastdllm_dual")[seed % 6]
    fixed = kind in ("llada", "d1")
    blocks, block_length = rng.randint(1, 3), rng.choice([1, 2, 4, 5, 8])
    length, rows, width = blocks * block_length, rng.randint(1, 3) if fixed else 1, rng.randint(1, 12)
    per_block = rng.choice([1, 2, block_length, block_length + 2]) if fixed else block_length + 1
    settings: dict[str, Any] = {
        "gen_length": length,
        "block_length": block_length,
        "steps": blocks * per_block,
        "temperature": rng.choice([0.0, 0.7, 1.5]),
        "remasking": rng.choice(["low_confidence", "low_confidence", "random"]),
        "cfg_scale": rng.choice([0.0, 1.5]) if fixed else 0.0,
    }
    if kind == "llada":
        settings["logits_eos_inf"], settings["confidence_eos_eot_inf"] = rng.random() < 0.3, rng.random() < 0.4
    if kind == "fastdllm_factor" or (not fixed and rng.random() < 0.2):
        settings["factor"] = rng.choice([0.0, 0.5, 1.0, 1.6, 4.0])
    elif not fixed:
        settings["threshold"] = rng.choice([None, 0.0, 0.2, 0.6, 1.0])
    prompts = torch.randint(0, 62, (rows, width), generator=generator)
    keys = torch.ones_like(prompts).bool()
    if kind == "llada":
        for row in range(rows):
            keys[row, : rng.randint(0, width - 1)] = False
    total, forwards = width + length, 2 * (blocks * per_block + length)  # more than are needed
    noise: dict[str, Any] = {
        "tokens": torch.rand(forwards, rows, total, 64, generator=generator, dtype=torch.float64).tolist(),
        "order": torch.rand(forwards, rows, total, generator=generator, dtype=torch.float64).tolist(),
    }
    cache = kind.split("_")[-1]
    source = {"function": f"generate_with_{cache}_cache" if cache in ("prefix", "dual") else "generate"}
    case = Case(folder(), f"{kind}_made_up", source, settings, {}, noise, {})
    return Recorded(case, prompts, keys, prompts, None, nfe=10**9)
