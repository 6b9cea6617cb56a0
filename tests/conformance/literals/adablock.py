"""AdaBlock's sampler, whose blocks end with a delimiter, and the threshold sampler that it is compared with."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import even_counts
from tests.conformance.cases import Case, folder
from tests.conformance.literals import llada
from tests.conformance.literals.tools import MASK_DRAWN, MASK_IN_PROMPT, Forwards, at, best, blank, padded
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise, gumbel, recorded_noise


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    if not _is_adaptive(recorded):
        return llada.config(recorded)
    return (llada.RandomOrder if settings.get("remasking") == "random" else DecodingConfig)(
        canvas_length=recorded.length,
        schedule="adablock",
        temperature=recorded.temperature,
        cache=recorded.case.cache,
        stop_at_eos=False,
        schedule_args={
            "delimiter_ids": tuple(settings["delimiter_ids"]),
            "delimiter_threshold": settings["delimiter_threshold"],
            "default_block": settings["init_block_length"],
            "threshold": settings["threshold"],
        },
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    return ReplayedNoise(recorded) if recorded.case.noise else None


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    settings, mask = recorded.case.settings, recorded.mask
    if settings.get("factor") is not None:  # Fast-dLLM's rule
        case = dataclasses.replace(recorded.case, name=f"fastdllm_{recorded.case.name}")
        return llada.literal(dataclasses.replace(recorded, case=case), deviations=deviations)
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    low = width = recorded.prompts.shape[1]
    ids = blank(recorded)
    open_slots = torch.arange(ids.shape[1]).expand_as(ids) >= width  # what "masked" means without the deviations
    result = Literal(ids)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    tokens, order = recorded_noise(recorded)
    model = Forwards(recorded)
    while low < ids.shape[1]:
        high, step = ids.shape[1], 0
        while step == 0 or bool(((ids == mask) if deviations else open_slots)[:, low:high].any()):
            cached = step > 0 and recorded.case.cache != "none"
            stop = high if cached and recorded.case.cache == "dual" else ids.shape[1]
            result.states.append(ids.clone())
            result.forwards.append(ids[:, low if cached else 0 : stop].clone())
            result.wrote.append(torch.tensor([True]))
            logits, forward = model(ids, low, cached, stop), len(result.forwards) - 1
            noised = logits.clone()
            if recorded.temperature:
                noised += recorded.temperature * padded(gumbel(at(tokens, forward)), ids, stop)
            if not deviations:
                noised[..., mask] = -torch.inf
            drawn = noised.argmax(-1)
            probability = logits.softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
            if step == 0:
                high = low + _block_length(recorded, drawn[0, low:], probability[0, low:])
                at_start = ((ids == mask) if deviations else open_slots)[:, low:high].sum(-1)
            eligible = ((ids == mask) if deviations else open_slots).clone()
            eligible[:, high:] = False
            if cached:  # the reference looks at the block, or at it and what follows, only
                eligible[:, :low] = False
            if bool(((drawn == mask) & eligible).any()):
                result.rules.add(MASK_DRAWN)
            scores = padded(at(order, forward), ids, stop) if settings.get("remasking") == "random" else probability
            scores = scores.masked_fill(~eligible, -torch.inf)
            counts = torch.tensor([1])
            if settings.get("threshold") is None:
                counts = even_counts(at_start, recorded.steps_per_block, torch.tensor(step))
            commit = best(scores, eligible, counts, deviations=deviations, rules=result.rules)
            if settings.get("threshold") is not None:
                commit |= eligible & (scores >= settings["threshold"])
            ids[commit] = drawn[commit]
            open_slots = open_slots & ~commit
            step += 1
        low = high
    return result


def _block_length(recorded: Recorded, drawn: Tensor, probability: Tensor) -> int:
    """The length of the block that starts the remaining positions."""
    settings, remaining = recorded.case.settings, len(drawn)
    if not _is_adaptive(recorded):
        return recorded.block_length
    window = min(int(0.25 * recorded.length), remaining)
    found = [i for i in range(window) if int(drawn[i]) in settings["delimiter_ids"]]
    surest = max(found, key=lambda i: float(probability[i]), default=None)
    if surest is None or float(probability[surest]) < settings["delimiter_threshold"]:
        return min(settings["init_block_length"], remaining)
    return surest + 1


def _is_adaptive(recorded: Recorded) -> bool:
    """Whether the sampler chooses its blocks, which the one that it is compared with does not."""
    return "init_block_length" in recorded.case.settings


def made_up(seed: int) -> Recorded:
    """Adaptive blocks three times out of four, with prefix cache every other time."""
    rng, generator = random.Random(f"adablock {seed}"), torch.Generator().manual_seed(seed)
    width, prefix = rng.randint(1, 10), seed % 2 == 1
    settings: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.5]),
        "remasking": rng.choice(["low_confidence", "low_confidence", "random"]),
        "threshold": rng.choice([0.0, 0.4, 0.6, 0.9, 1.0]),
    }
    if seed % 4 < 3:
        settings["gen_length"], settings["init_block_length"] = rng.randint(1, 32), rng.choice([1, 3, 8, 16, 40])
        settings["delimiter_ids"] = rng.sample(range(64), rng.choice([0, 3, 20]))
        settings["delimiter_threshold"] = rng.choice([0.0, 0.1, 0.3, float("inf")])
    else:
        settings["block_length"] = rng.choice([2, 4, 8])
        settings["gen_length"] = settings["steps"] = 2 * settings["block_length"]
    total, forwards = width + settings["gen_length"], 2 * settings["gen_length"] + 1  # more than are needed
    noise = {
        "tokens": torch.rand(forwards, 1, total, 64, generator=generator, dtype=torch.float64).tolist(),
        "order": torch.rand(forwards, 1, total, generator=generator, dtype=torch.float64).tolist(),
    }
    prompts = torch.randint(0, 62, (1, width), generator=generator)
    source = {"function": "generate_prefix_cache" if prefix else "generate"}
    case = Case(folder(), "adablock_made_up", source, settings, {}, noise, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
