"""Fast-dLLM's samplers for Dream: blocks with prefix or dual cache, by a threshold or by Dream's numbers per step."""

from __future__ import annotations

import random
from typing import Any

import torch

from rl4dlm.rollout.decoding import DecodingConfig
from tests.conformance.cases import Case, folder
from tests.conformance.literals.dream import DEFAULT_EPS, ENTROPY_OFFSET
from tests.conformance.literals.tools import IDLE_STEPS, MASK_DRAWN, MASK_IN_PROMPT, Forwards, best, blank
from tests.conformance.samplers import Literal, Recorded

FIRST_TOKEN = (
    "the reference's first forward in a block writes the block's first token alone, at any confidence, because later "
    "ones do not feed the row that predicts it; here that row is fed, and the first forward is one like the others"
)


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    by_threshold = settings["alg"] == "confidence_threshold"
    arguments: dict[str, Any] = {"threshold": settings["threshold"]}
    if not by_threshold:
        arguments = {"counts": "floor", "eps": settings.get("eps", DEFAULT_EPS)}
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule="threshold" if by_threshold else "dream_" + settings["alg"],
        steps=None if by_threshold else recorded.steps_per_block * (recorded.length // recorded.block_length),
        stop_at_eos=False,
        cache="dual" if settings["dual_cache"] else "prefix",
        schedule_args=arguments,
    )


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    settings, mask, steps = recorded.case.settings, recorded.mask, recorded.steps_per_block
    assert settings["alg"] in ("confidence_threshold", "entropy", "maskgit_plus")
    by_threshold = settings["alg"] == "confidence_threshold"
    ids, width, size = blank(recorded), recorded.prompts.shape[1], recorded.block_length
    at = torch.arange(ids.shape[1])
    open_slots = at >= width  # what "masked" means without the deviations
    times = torch.linspace(1, settings.get("eps", DEFAULT_EPS), steps + 1)
    result, model = Literal(ids), Forwards(recorded)
    if deviations:
        result.rules |= {FIRST_TOKEN, MASK_IN_PROMPT} if recorded.masks_in_prompt else {FIRST_TOKEN}
    for low in range(width, len(at), size):
        high = low + size if settings["dual_cache"] else len(at)
        step = 0
        while True:
            block = (at >= low) & (at < low + size)
            masked = block & ((ids[0] == mask) if deviations else open_slots)
            first = 0 if step == 0 else low if deviations else low - 1
            result.states.append(ids.clone())
            result.forwards.append(ids[:, first : high if step else len(at)].clone())
            result.wrote.append(masked.any()[None])
            if not bool(masked.any()):
                result.rules.add(IDLE_STEPS)
            logits = model.part(ids, (at >= first) & ((at < high) | (step == 0)))[0]
            if by_threshold or step < steps:
                share = torch.tensor(1.0) if by_threshold or step >= steps - 1 else 1 - times[step + 1] / times[step]
                probabilities = logits.softmax(-1).nan_to_num(0.0)
                if not deviations:
                    logits[:, mask] = -torch.inf
                drawn = logits.argmax(-1)
                if bool((drawn[masked] == mask).any()):
                    result.rules.add(MASK_DRAWN)
                scores = probabilities.gather(-1, drawn[:, None])[:, 0]
                exact = (probabilities * probabilities.clamp(min=1e-300).log()).sum(-1)
                if settings["alg"] == "entropy":
                    scores = (probabilities * (probabilities + 1e-10).log()).sum(-1) if deviations else exact
                scores, exact = (s.masked_fill(~masked, -torch.inf)[None] for s in (scores, exact))
                count = masked.any()[None].long() if by_threshold else (masked.sum() * share).long()[None]
                chosen = best(scores, masked[None], count, deviations=deviations, rules=result.rules)[0] & masked
                if deviations and settings["alg"] == "entropy":
                    other = best(exact, masked[None], count, deviations=deviations, rules=result.rules)[0] & masked
                    result.rules |= set() if torch.equal(chosen, other) else {ENTROPY_OFFSET}
                if by_threshold:
                    chosen |= masked & (scores[0] >= settings["threshold"])
                if deviations and step == 0:
                    chosen = at == low
                ids[0, chosen] = drawn[chosen]
                open_slots = open_slots & ~chosen
            left = block & ((ids[0] == mask) if deviations else open_slots)
            step += 1
            if not bool(left.any()) and (step > 1 or not deviations):
                break
            if step > steps and not by_threshold and deviations:
                break
    return result


def made_up(seed: int) -> Recorded:
    """Prompts and settings of any kind."""
    rng, generator = random.Random(f"fastdllmdream {seed}"), torch.Generator().manual_seed(seed)
    blocks, block_length, width = rng.randint(1, 3), rng.choice([2, 4, 5, 8]), rng.randint(1, 12)
    settings: dict[str, Any] = {
        "alg": ("confidence_threshold", "entropy")[seed % 2],
        "threshold": rng.choice([0.0, 0.3, 0.6, 0.9]),
        "steps": blocks * rng.randint(2, block_length + 2),
        "max_new_tokens": blocks * block_length,
        "block_length": block_length,
        "dual_cache": rng.random() < 0.5,
        "eps": rng.choice([1e-3, 0.1]),
        "shift": "dream",
    }
    prompts = torch.randint(0, 62, (1, width), generator=generator)
    case = Case(folder(), "fastdllmdream_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
