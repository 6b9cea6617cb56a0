"""d3LLM's multi-block decoding of models with full attention, with its delayed prefix cache."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import MASK_DRAWN, MASK_IN_PROMPT, Forwards, blank
from tests.conformance.samplers import Literal, Recorded

KEPT_TWICE = (
    "where two finished blocks wait at once, a full forward of the reference replaces the keys of all before the last "
    "one, so that the first one is attended to twice; here that of all before the first"
)


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule="multi_block",
        schedule_args={
            "add_threshold": settings["block_add_threshold"],
            "entropy_threshold": settings["entropy_threshold"],
        },
        cache="delayed_prefix",
        cache_args={"delay": settings["cache_delay_iter"], "refresh_steps": settings["refresh_interval"]},
        stop_at_eos=False,
    )


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    settings, mask, size = recorded.case.settings, recorded.mask, recorded.block_length
    ids, width = blank(recorded), recorded.prompts.shape[1]
    at, count = torch.arange(ids.shape[1]), recorded.length // size
    blocks = [slice(0, width), *(slice(width + i * size, width + (i + 1) * size) for i in range(count))]
    open_slots = at >= width  # what "masked" means without the deviations
    result, model = Literal(ids), Forwards(recorded)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    finished: dict[int, int] = {0: 0}  # block to the forward, from 1, that finds it finished; the prompt is block 0
    opened, kept, stored = 1, 0, False  # blocks of the canvas that are open, columns that are kept, whether any is
    while bool(open_slots.any()):
        if result.forwards and opened < count:
            last = blocks[opened]
            opened += 1 - float(open_slots[last].sum()) / size >= settings["block_add_threshold"]
        number = len(result.forwards) + 1
        settled, waiting = kept, []
        for i in range(opened + 1):
            if bool(open_slots[blocks[i]].any()):
                break
            if blocks[i].stop <= kept:
                continue
            if number - finished.setdefault(i, number) >= settings["cache_delay_iter"]:
                settled = blocks[i].stop
            else:
                waiting.append(i)
        refreshes = bool(waiting) or not stored or number % settings["refresh_interval"] == 0
        first = kept if settled > kept or not refreshes else 0
        if deviations and len(waiting) > 1 and first == 0 and stored:
            result.rules.add(KEPT_TWICE)
        result.states.append(ids.clone())
        result.forwards.append(ids[:, first:].clone())
        result.wrote.append(torch.tensor([True]))
        logits = model.part(ids, at >= first)[0]
        stored, kept = stored or settled > kept, settled
        if not deviations:
            logits[:, mask] = -torch.inf
        chosen, drawn = _by_entropy(recorded, logits, open_slots, blocks[1 : opened + 1])
        if bool((drawn[chosen] == mask).any()):
            result.rules.add(MASK_DRAWN)
        ids[0, chosen] = drawn[chosen]
        open_slots = open_slots & ~chosen
    return result


def _by_entropy(recorded: Recorded, logits: Tensor, open_slots: Tensor, blocks: list[slice]) -> tuple[Tensor, Tensor]:
    """bool `[T]`, what is written: the lowest entropy of all open blocks, what is below the threshold, and something
    of the first one that is not finished; and long `[T]`, with what."""
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
    entropy[~open_slots] = torch.inf
    entropy[blocks[-1].stop :] = torch.inf
    chosen = entropy <= recorded.case.settings["entropy_threshold"]
    chosen[entropy.argmin()] = True
    for part in blocks:
        if bool(open_slots[part].any()):
            if not bool(chosen[part].any()):
                chosen[part.start + int(entropy[part].argmin())] = True
            break
    return chosen, logits.argmax(-1)


def made_up(seed: int) -> Recorded:
    """Prompts and settings of any kind."""
    rng, generator = random.Random(f"d3cache {seed}"), torch.Generator().manual_seed(seed)
    size = rng.choice([2, 3, 4, 8])
    settings: dict[str, Any] = {
        "block_length": size,
        "max_new_tokens": size * rng.randint(1, 5),
        "block_add_threshold": rng.choice([0.1, 0.5, 0.9, 1.0]),
        "entropy_threshold": rng.choice([0.0, 0.3, 0.7, 1.5]),
        "cache_delay_iter": rng.randint(0, 3),
        "refresh_interval": rng.choice([3, 4, 10000]),
    }
    prompts = torch.randint(0, 62, (1, rng.randint(1, 10)), generator=generator)
    case = Case(folder(), "d3cache_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
