"""EOSER, ascending step sizes and both together, as in the evaluation code of the consistency-trajectory paper."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import Schedule, even_counts, random_order
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import (
    IDLE_STEPS,
    MASK_DRAWN,
    MASK_IN_PROMPT,
    Forwards,
    at,
    best,
    blank,
    padded,
)
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise, gumbel, recorded_noise

FACTOR_RESTARTS = (
    "with several blocks the reference divides the step within the block by the number of all steps, so that the "
    "factor restarts and never reaches its maximum; here it rises to it over the steps of each block"
)
FLOAT32_NOISE = "the reference draws its Gumbel noise and adds it in float32"


class RandomOrder(DecodingConfig):
    """What `remasking="random"` means together with these schedules, from the library's parts."""

    def build_schedule(self) -> Schedule:
        schedule = super().build_schedule()
        assert isinstance(schedule, Schedule)
        return dataclasses.replace(schedule, confidence=random_order)


def config(recorded: Recorded) -> DecodingConfig:
    least, most = _gammas(recorded)
    arguments: dict[str, Any] = {"num_blocks": _block_num(recorded)} if _ascends(recorded) else {}
    if _discounts(recorded):
        arguments |= {"min_gamma": least, "max_gamma": most}
    blocks: dict[str, Any] = {}
    if not _ascends(recorded):
        blocks["block_length"] = recorded.block_length
        blocks["steps"] = recorded.steps_per_block * (recorded.length // recorded.block_length)
    return (RandomOrder if _is_random(recorded) else DecodingConfig)(
        canvas_length=recorded.length,
        schedule="eoser" if not _ascends(recorded) else "eoser_ass" if _discounts(recorded) else "ass",
        temperature=recorded.temperature,
        cfg_scale=recorded.guidance,
        stop_at_eos=False,
        schedule_args=arguments,
        **blocks,
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    if not recorded.case.noise:
        return None
    return ReplayedNoise(recorded) if _ascends(recorded) else _Noise(recorded)


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    mask, width = recorded.mask, recorded.prompts.shape[1]
    ids = blank(recorded)
    open_slots = torch.arange(ids.shape[1]).expand_as(ids) >= width  # what "masked" means without the deviations
    result = Literal(ids)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    blocks = _ascending(recorded) if _ascends(recorded) else _even(recorded, deviations)
    if deviations and _discounts(recorded) and not _ascends(recorded) and len(blocks) > 1:
        result.rules.add(FACTOR_RESTARTS)
    tokens, order = recorded_noise(recorded)
    model, high = Forwards(recorded), width
    for length, steps in blocks:
        low, high = high, high + length
        masked_at_start = ((ids == mask) if deviations else open_slots)[:, low:high].sum(-1)
        for step, (count, progress) in enumerate(steps):
            masked = (ids == mask) if deviations else open_slots
            eligible = masked.clone()
            eligible[:, high:] = False
            counts = torch.full_like(masked_at_start, count)
            if not _ascends(recorded):
                counts = even_counts(masked_at_start, len(steps), torch.tensor(step))
            result.states.append(ids.clone())
            result.forwards.append(ids.clone())
            result.wrote.append(eligible.any(-1) & (counts > 0))
            logits, forward = model(ids), len(result.forwards) - 1
            drawn = _draw(logits, recorded, at(tokens, forward) if recorded.temperature else None, ids, deviations)
            if deviations and recorded.temperature:
                exact = _draw(logits, recorded, at(tokens, forward), ids, False)
                if bool((eligible & (exact != drawn) & (drawn != mask)).any()):
                    result.rules.add(FLOAT32_NOISE)
            if bool(((drawn == mask) & eligible).any()):
                result.rules.add(MASK_DRAWN)
            confidence = logits.softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
            if _discounts(recorded):
                least, most = _gammas(recorded)
                factor = least + (most - least) * progress
                confidence = torch.where(torch.isin(drawn, torch.tensor(recorded.eos)), factor * confidence, confidence)
            if _is_random(recorded):
                confidence = padded(at(order, forward), ids)
            confidence = confidence.masked_fill(~eligible, -torch.inf)
            commit = best(confidence, eligible, counts, deviations=deviations, rules=result.rules)
            ids[commit] = torch.where(masked, drawn, ids)[commit]
            open_slots = open_slots & ~commit
    if not all(bool(wrote.all()) for wrote in result.wrote):
        result.rules.add(IDLE_STEPS)
    return result


def _draw(logits: Tensor, recorded: Recorded, uniforms: Tensor | None, ids: Tensor, deviations: bool) -> Tensor:
    """Candidates long `[B, T]`: the reference's arithmetic, or ours."""
    if uniforms is None:
        noised = logits.clone()
    elif deviations:
        noised = logits.float().exp() / (-padded(uniforms, ids).float().log()) ** recorded.temperature
    else:
        noised = logits + recorded.temperature * padded(gumbel(uniforms), ids)
    if not deviations:
        noised[..., recorded.mask] = -torch.inf
    return noised.argmax(-1)


def _even(recorded: Recorded, deviations: bool) -> list[tuple[int, list[tuple[int, float]]]]:
    """Blocks: their length, and for each step 0 (the count follows from what is masked) and EOSER's progress."""
    blocks, steps = recorded.length // recorded.block_length, recorded.steps_per_block
    total = recorded.case.settings["steps"] if deviations else steps
    progress = [min(step, total - 1) / (total - 1) if total > 1 else 1.0 for step in range(steps)]
    return [(recorded.block_length, [(0, value) for value in progress])] * blocks


def _ascending(recorded: Recorded) -> list[tuple[int, list[tuple[int, float]]]]:
    """Blocks: their length, and for each step how many it writes and EOSER's progress. From the right: the last block
    is as long as all before it and two more, and what a power of two leaves over; the others halve."""
    power = len(f"{recorded.length:b}") - 1
    progress = [(2 ** (step + 1) - 1) / 2**power if power > 1 else 1.0 for step in range(max(1, power))]
    left, blocks = recorded.length, []
    for _ in range(_block_num(recorded) - 1):
        power -= 1
        length = 2**power if blocks else 2**power + 1 + recorded.length - 2 ** (power + 1)
        blocks.append((length, [(length, progress[power])]))
        left -= length
    counts = [2**step for step in range(power - 1)]
    counts.append(left - sum(counts))
    blocks.append((left, list(zip(counts, progress, strict=False))))
    return blocks[::-1]


def _ascends(recorded: Recorded) -> bool:
    return "ass" in _function(recorded)


def _discounts(recorded: Recorded) -> bool:
    return "eoser" in _function(recorded)


def _function(recorded: Recorded) -> str:
    return str(recorded.case.source.get("function") or recorded.case.name)


def _gammas(recorded: Recorded) -> tuple[float, float]:
    least = 0.01 if _ascends(recorded) else 0.4  # the functions' own defaults
    settings = recorded.case.settings
    return settings.get("eos_min_gamma", least), settings.get("eos_max_gamma", 1.0)


def _block_num(recorded: Recorded) -> int:
    return recorded.case.settings.get("block_num", 4)


def _is_random(recorded: Recorded) -> bool:
    return recorded.case.settings.get("remasking") == "random"


class _Noise(ReplayedNoise):
    """Steps of a block that have nothing to write come last; ours are those before."""

    def forward_of(self, row: int, step: int, position: int) -> int:
        steps = self.recorded.steps_per_block
        working = min(steps, self.recorded.block_length)
        return step // working * steps + step % working


def made_up(seed: int) -> Recorded:
    """A case of any of the three samplers, the seeds taking turns."""
    rng, generator = random.Random(f"eoser {seed}"), torch.Generator().manual_seed(seed)
    kind = ("eoser", "ass", "eoser_ass")[seed % 3]
    settings: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "remasking": rng.choice(["low_confidence", "low_confidence", "random"]),
        "cfg_scale": rng.choice([0.0, 0.0, 1.5]),
    }
    if kind == "eoser":
        blocks, block_length = rng.randint(1, 3), rng.choice([1, 4, 5, 8])
        steps = blocks * rng.choice([1, 2, block_length, block_length + 2]) + rng.choice([0, 0, 1])
        settings |= {"block_length": block_length, "steps": steps, "gen_length": blocks * block_length}
    else:
        length = rng.randint(2, 40)
        steps = len(f"{length:b}") - 1
        settings |= {"gen_length": length, "steps": steps, "block_num": rng.randint(1, steps)}
    if kind != "ass":
        settings |= {"eos_min_gamma": rng.choice([0.0, 0.1, 0.4]), "eos_max_gamma": rng.choice([0.6, 1.0])}
    rows, width = rng.randint(1, 3), rng.randint(1, 12)
    prompts = torch.randint(0, 62, (rows, width), generator=generator)
    total, forwards = width + settings["gen_length"], 60
    noise = {
        "tokens": torch.rand(forwards, rows, total, 64, generator=generator).tolist(),
        "order": torch.rand(forwards, rows, total, generator=generator, dtype=torch.float64).tolist(),
    }
    case = Case(folder(), f"{kind}_made_up", {"function": f"{kind}_generate"}, settings, {}, noise, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
