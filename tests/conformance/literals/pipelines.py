"""Decoders that keep several blocks open: D2F's pipeline, whose model sees its blocks from left to right, and d3LLM's
multi-block decoding of models with full attention.

Each literal is a plain loop over one row with a forward of all that is there at each step; what is cached on the way
changes nothing in D2F, whose blocks are stored once they and all before them are complete.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from tests.conformance.cases import Case, folder
from tests.conformance.denoisers import build, spec_of
from tests.conformance.literals.tools import MASK_IN_PROMPT
from tests.conformance.samplers import Literal, Recorded

ENDS = (
    "d3LLM's early stop writes ends of sequence behind the first one at once, where the model then sees them; here "
    "what follows an end is decoded as anything else until all before it is written"
)


def record(case: Case) -> Recorded:
    """The record with whole rows as states. D2F feeds a part of the row and stops behind the last block it opened."""
    found = Recorded.of(case)
    assert len(found.prompts) == 1, "records of these families have one row"
    width = found.prompts.shape[1] + _canvas(found)
    ids = torch.full((1, width), found.eos[0])
    ids[:, : found.ids.shape[1]] = found.ids
    starts = [start for start, _ in case.outputs.get("fed_ranges") or [[0, 0]] * len(found.forwards or ())]
    forwards = []
    for start, fed in zip(starts, found.forwards or (), strict=True):
        row = torch.full((1, width), found.mask)
        row[:, :start] = ids[:, :start]
        row[:, start : start + fed.shape[1]] = fed
        forwards.append(row)
    return dataclasses.replace(found, ids=ids, forwards=forwards)


def model(recorded: Recorded) -> tuple[Any, DiffusionSpec]:
    """The tiny model; for D2F with blocks that are seen from left to right, of which the prompt is the first."""
    spec = spec_of(recorded.case)
    if recorded.case.family == "d2f":
        blocks = {"attention": "block_causal", "block_length": recorded.block_length, "grid_origin": "whole_prompt"}
        spec = dataclasses.replace(spec, **blocks)
    return _model(spec, recorded.case.compute_dtype), spec


@functools.lru_cache(maxsize=8)
def _model(spec: DiffusionSpec, dtype: str) -> Any:
    return build("model", spec, dtype)


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    shared = {"canvas_length": _canvas(recorded), "block_length": recorded.block_length}
    opening = {"add_threshold": settings["block_add_threshold"]}
    if recorded.case.family == "d2f":
        sure = {"threshold": settings["skip_threshold"], "active_threshold": settings["decoded_token_threshold"]}
        return DecodingConfig(**shared, schedule="d2f", schedule_args={**opening, **sure}, stop_at_eos="block")
    arguments = {**opening, "entropy_threshold": settings["entropy_threshold"]}
    early = bool(settings.get("early_stop"))
    return DecodingConfig(**shared, schedule="multi_block", schedule_args=arguments, stop_at_eos=early)


def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    found = _decoded(recorded, deviations)
    if deviations and recorded.masks_in_prompt:
        found.rules.add(MASK_IN_PROMPT)
    elif deviations:
        ours = _decoded(recorded, False)
        states = [torch.equal(a, b) for a, b in zip(found.states, ours.states, strict=False)]
        if len(found.states) != len(ours.states) or not all(states) or not torch.equal(found.ids, ours.ids):
            found.rules.add(ENDS)
    return found


def _decoded(recorded: Recorded, deviations: bool) -> Literal:
    settings, mask, size = recorded.case.settings, recorded.mask, recorded.block_length
    prompt, blocks = recorded.prompts.shape[1], _canvas(recorded) // size
    pipelined, early = recorded.case.family == "d2f", bool(settings.get("early_stop"))
    ids = torch.cat([recorded.prompts[0], torch.full((blocks * size,), mask)])
    states, opened = [], 1

    def block(number: int) -> slice:
        return slice(prompt + number * size, prompt + (number + 1) * size)

    def decoded(number: int) -> float:
        return 1.0 if number < 0 else 1 - int((ids[block(number)] == mask).sum()) / size

    while True:
        states.append(ids.clone()[None])
        logits = _logits(recorded, ids[: prompt + opened * size] if pipelined else ids)
        step = _pipelined if pipelined else _by_entropy
        ids = step(recorded, ids, logits, [decoded(number - 1) for number in range(opened)])
        ends = bool(torch.isin(ids[prompt:], torch.tensor(recorded.eos)).any())
        if early and ends and deviations:
            ids[prompt + int((ids[prompt:] == recorded.eos[0]).nonzero()[0]) + 1 :] = recorded.eos[0]
        waits = ends and pipelined
        if waits and not bool((ids[: prompt + opened * size] == mask).any()):
            break
        if early and not deviations and _ended(ids[prompt:].tolist(), recorded):
            break
        if not bool((ids == mask).any()):
            break
        if opened < blocks and decoded(opened - 1) >= settings["block_add_threshold"] and not waits:
            opened += 1
    ids = torch.where(ids == mask, recorded.eos[0], ids)  # what nothing was written to
    return Literal(ids[None], states, states, [torch.ones(1).bool()] * len(states))


def _ended(canvas: list[int], recorded: Recorded) -> bool:
    """Whether all up to an end is written."""
    return any(token in recorded.eos and recorded.mask not in canvas[:place] for place, token in enumerate(canvas))


def _pipelined(recorded: Recorded, ids: Tensor, logits: Tensor, before: list[float]) -> Tensor:
    """D2F: what is sure in any open block, and at least one token where the block before is decoded far enough."""
    settings, size, prompt = recorded.case.settings, recorded.block_length, recorded.prompts.shape[1]
    confidence, token = logits.softmax(-1).max(-1)
    ids = ids.clone()
    for number, share in enumerate(before):
        places = torch.arange(prompt + number * size, prompt + (number + 1) * size)
        places = places[ids[places] == recorded.mask]
        chosen = places[confidence[places] > settings["skip_threshold"]]
        if len(places) and not len(chosen) and share >= settings["decoded_token_threshold"]:
            chosen = places[confidence[places].argmax()][None]
        ids[chosen] = token[chosen]
    return ids


def _by_entropy(recorded: Recorded, ids: Tensor, logits: Tensor, before: list[float]) -> Tensor:
    """d3LLM: the lowest entropy of all, what is below the threshold, and something of the first open block."""
    size, prompt = recorded.block_length, recorded.prompts.shape[1]
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
    entropy[ids != recorded.mask] = torch.inf
    entropy[prompt + len(before) * size :] = torch.inf
    chosen = entropy <= recorded.case.settings["entropy_threshold"]
    chosen[entropy.argmin()] = True
    for number in range(len(before)):
        part = slice(prompt + number * size, prompt + (number + 1) * size)
        if bool((ids[part] == recorded.mask).any()):
            if not bool(chosen[part].any()):
                chosen[part.start + int(entropy[part].argmin())] = True
            break
    return torch.where(chosen, logits.argmax(-1), ids)


@torch.no_grad()
def _logits(recorded: Recorded, ids: Tensor) -> Tensor:
    """`[n, V]`: blocks see themselves and those before them in D2F, everything sees everything in d3LLM."""
    mask = torch.ones(len(ids), len(ids)).bool()
    if recorded.case.family == "d2f":
        place = torch.arange(len(ids)) - recorded.prompts.shape[1]
        block = place.div(recorded.block_length, rounding_mode="floor").clamp(min=-1)
        mask = block[:, None] >= block
    positions = torch.arange(len(ids))[None]
    found = model(recorded)[0](input_ids=ids[None], attention_mask=mask[None, None], position_ids=positions)
    shift = spec_of(recorded.case).logit_shift
    return torch.cat([found.logits[0, :1], found.logits[0, :-1]]) if shift else found.logits[0]


def _canvas(recorded: Recorded) -> int:
    """Slots of whole blocks."""
    return recorded.length // recorded.block_length * recorded.block_length


def made_up(seed: int) -> Recorded:
    """D2F and d3LLM in turns."""
    rng, generator = random.Random(f"pipelines {seed}"), torch.Generator().manual_seed(seed)
    size = rng.choice([1, 2, 3, 4, 8])
    settings: dict[str, Any] = {
        "block_length": size,
        "max_new_tokens": size * rng.randint(1, 6),
        "block_add_threshold": rng.choice([0.1, 0.25, 0.5, 0.9, 1.0]),
        "decoded_token_threshold": rng.choice([0.0, 0.5, 0.75, 0.95, 1.0]),
        "shift": rng.choice(["", "dream"]),
    }
    if seed % 2:
        settings["skip_threshold"] = rng.choice([0.0, 0.4, 0.6, 0.9, 1.0])
    else:
        settings["entropy_threshold"] = rng.choice([0.0, 0.3, 0.7, 1.5])
        settings["early_stop"] = rng.random() < 0.5
    prompts = torch.randint(0, 62, (1, rng.randint(1, 10)), generator=generator)
    case = Case(folder(), "d2f_made_up" if seed % 2 else "d3multiblock_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
