"""FreeCache's sampler: LLaDA's, with the keys and values of finished blocks frozen."""

from __future__ import annotations

import random
from typing import Any

import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import even_counts
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import IDLE_STEPS, MASK_DRAWN, MASK_IN_PROMPT, Forwards, best, blank
from tests.conformance.samplers import Literal, Recorded

FROZEN_MASKS = (
    "the reference freezes a block as its last forward saw it, with masks where that very forward then writes; here "
    "the first forward of the next block feeds it once more"
)
ANY_END = (
    "with early stop the reference fills everything behind the first end-of-sequence token, prompt included, whatever "
    "is written there or still masked before it, and goes on; here a row is finished once everything before its end is "
    "written, and what is written stays"
)


def config(recorded: Recorded) -> DecodingConfig:
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule="low_confidence",
        steps=recorded.steps_per_block * (recorded.length // recorded.block_length),
        stop_at_eos=bool(recorded.case.settings.get("early_stop")),
        cache="frozen_prompt",
    )


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    settings, mask, steps = recorded.case.settings, recorded.mask, recorded.steps_per_block
    early, ends = settings.get("early_stop"), torch.tensor(recorded.eos)
    end = settings.get("eos_token_id", recorded.eos[0])
    ids, width, size = blank(recorded), recorded.prompts.shape[1], recorded.block_length
    at = torch.arange(ids.shape[1])
    open_slots = at >= width  # what "masked" means without the deviations
    result, model = Literal(ids), Forwards(recorded)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    for low in range(width, len(at), size):
        masked = (ids[0] == mask) if deviations else open_slots
        at_start = masked[low : low + size].sum()[None]
        for step in range(steps):
            masked = (ids[0] == mask) if deviations else open_slots
            if not bool(masked.any()) and (early or not deviations):
                return result
            eligible = masked & (at < low + size)
            count = even_counts(at_start, steps, torch.tensor(step))
            first = 0 if not result.forwards else low
            if not deviations and step == 0 and low > width:
                first = low - size
            wrote = bool(eligible.any()) and int(count) > 0
            if not deviations and not wrote:
                continue
            result.states.append(ids.clone())
            result.forwards.append(ids[:, first:].clone())
            result.wrote.append(torch.tensor([wrote]))
            if not wrote:
                result.rules.add(IDLE_STEPS)
            logits = model.part(ids, at >= first)[0]
            if not deviations:
                logits[:, mask] = -torch.inf
            drawn = logits.argmax(-1)
            if bool((drawn[eligible] == mask).any()):
                result.rules.add(MASK_DRAWN)
            confidence = logits.softmax(-1).gather(-1, drawn[:, None])[:, 0]
            scores = confidence.masked_fill(~eligible, -torch.inf)[None]
            chosen = best(scores, eligible[None], count, deviations=deviations, rules=result.rules)[0] & eligible
            ids[0, chosen] = drawn[chosen]
            open_slots = open_slots & ~chosen
            if deviations and wrote and low + size < len(at) and (step == steps - 1):
                result.rules.add(FROZEN_MASKS)
            if not early:
                continue
            found = (ids[0] == end).nonzero()[:, 0]
            if deviations and len(found):
                behind = ids[0, int(found[0]) + 1 :]
                if bool((ids[0, : int(found[0])] == mask).any() | ((behind != mask) & (behind != end)).any()):
                    result.rules.add(ANY_END)
                behind[:] = end
            settled = torch.isin(ids[0], ends) & (at >= width) & (open_slots.cumsum(-1) == 0)
            if not deviations and bool(settled.any()):
                ids[0, open_slots] = recorded.eos[0]
                return result
    return result


def made_up(seed: int) -> Recorded:
    """Prompts and settings of any kind."""
    rng, generator = random.Random(f"freecache {seed}"), torch.Generator().manual_seed(seed)
    blocks, block_length, width = rng.randint(1, 4), rng.choice([1, 4, 5, 8]), rng.randint(1, 12)
    settings: dict[str, Any] = {
        "steps": blocks * rng.choice([1, 2, block_length, block_length + 2]),
        "gen_length": blocks * block_length,
        "block_length": block_length,
        "early_stop": rng.random() < 0.5,
    }
    prompts = torch.randint(2, 62, (1, width), generator=generator)
    case = Case(folder(), "freecache_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
