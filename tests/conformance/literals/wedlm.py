"""WeDLM's decoders on the tiny model with causal attention in another order: what is written, then what is masked.

The literals feed the tokens in that order, with the positions that they have, under a causal mask. The sliding window
goes on behind the limit of tokens in the released code, so that our canvas is a window longer and cut.
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
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case, folder
from tests.conformance.denoisers import build, spec_of
from tests.conformance.literals.tools import MASK_IN_PROMPT
from tests.conformance.samplers import Literal, Recorded, Run, rows_of

SCALED = "WeDLM's block decoder compares tempered probabilities of the most probable tokens; here untempered ones"


def record(case: Case) -> Recorded:
    """The record with whole rows as states, without the forward of the prompt alone and those that decide nothing."""
    found = Recorded.of(case)
    assert found.forwards is not None and len(found.prompts) == 1
    forwards = []
    for number, (fed, places) in enumerate(zip(found.forwards, case.outputs["positions"], strict=True)):
        row = torch.full((1, max(_width(found), 1 + max(places))), found.mask)
        before = min(places)
        row[:, :before] = found.ids[:, :before]
        row[:, places] = fed
        if (number == 0 and _slides(found)) or _done(found, row[0]):
            continue
        forwards.append(row[:, : _width(found)])
    return dataclasses.replace(found, forwards=forwards, nfe=len(forwards))


def model(recorded: Recorded) -> tuple[Any, DiffusionSpec]:
    """The tiny model with the attention of WeDLM."""
    spec = dataclasses.replace(spec_of(recorded.case), attention="written_first")
    return _model(spec, recorded.case.compute_dtype), spec


@functools.lru_cache(maxsize=8)
def _model(spec: DiffusionSpec, dtype: str) -> Any:
    return build("model", spec, dtype)


def config(recorded: Recorded) -> DecodingConfig:
    settings, canvas = recorded.case.settings, _width(recorded) - recorded.prompts.shape[1]
    if _slides(recorded):
        arguments = {
            "window": settings["wedlm_window_size"],
            "entropy_threshold": settings["entropy_threshold"] or 0.0,  # without one: the best alone
            "distance_penalty": settings["pos_penalty_factor"],
        }
        return DecodingConfig(canvas_length=canvas, schedule="sliding_window", schedule_args=arguments)
    size, arguments = settings["block_size"], {"threshold": settings["confidence_threshold"] or torch.inf}
    if canvas % size == 0:
        blocks = {"schedule": "threshold", "block_length": size}
    else:  # blocks of a given length of which the last is shorter
        blocks, arguments["default_block"] = {"schedule": "adablock"}, size
    return DecodingConfig(canvas_length=canvas, **blocks, schedule_args=arguments, stop_at_eos=False)


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout up to the step that decides the last token that counts."""
    run = rows_of(recorded, rollout)
    states = [state for state in run.states[0] if not _done(recorded, state)]
    return Run(_cut(recorded, run.ids), [states], [len(states)])


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    settings, mask, start = recorded.case.settings, recorded.mask, recorded.prompts.shape[1]
    ids = torch.full((_width(recorded),), mask)
    ids[:start] = recorded.prompts[0]
    states = []
    rules = {MASK_IN_PROMPT} if deviations and recorded.masks_in_prompt else set()
    while not _done(recorded, ids):
        states.append(ids.clone()[None])
        first = int((ids == mask).nonzero()[0])
        if _slides(recorded):
            end = min(first + settings["wedlm_window_size"], len(ids))
            places = torch.tensor([place for place in range(end) if ids[place] == mask])
            logits = _logits(recorded, ids[:end])[places]
            probabilities = logits.softmax(-1)
            entropy = -(probabilities * probabilities.clamp_min(1e-300).log()).sum(-1)
            entropy = entropy + settings["pos_penalty_factor"] * (places - first)
            threshold = settings["entropy_threshold"]
            chosen = entropy < (-torch.inf if threshold is None else threshold)
            best = entropy.argmin()
        else:
            size, threshold = settings["block_size"], settings["confidence_threshold"]
            end = min(start + (first - start) // size * size + size, len(ids))
            places = torch.tensor([place for place in range(end) if ids[place] == mask])
            logits = _logits(recorded, ids[:end])[places]
            heat = settings.get("temperature") or 1.0
            if heat != 1.0 and deviations:
                rules.add(SCALED)
            confidence = (logits / (heat if deviations else 1.0)).softmax(-1).max(-1).values
            chosen = confidence >= (threshold if threshold > 0 else torch.inf)
            best = confidence.argmax()
        if not bool(chosen.any()):
            chosen[best] = True
        ids[places[chosen]] = logits.argmax(-1)[chosen]
    return Literal(_cut(recorded, ids[None]), states, states, [torch.ones(1).bool()] * len(states), rules)


def _logits(recorded: Recorded, ids: Tensor) -> Tensor:
    """`[n, V]` of a row whose tokens are fed with the written ones first, in the order of the row."""
    written = ids != recorded.mask
    order = torch.cat([written.nonzero().flatten(), (~written).nonzero().flatten()])
    sees = torch.ones(len(ids), len(ids)).tril().bool()
    found = model(recorded)[0](
        input_ids=ids[order][None], attention_mask=sees[None, None], position_ids=order[None], use_cache=False
    ).logits[0]
    return torch.empty_like(found).index_copy(0, order, found)


def _slides(recorded: Recorded) -> bool:
    return "wedlm_window_size" in recorded.case.settings


def _width(recorded: Recorded) -> int:
    return recorded.prompts.shape[1] + recorded.length + recorded.case.settings.get("wedlm_window_size", 0)


def _done(recorded: Recorded, row: Tensor) -> bool:
    """Whether the tokens that count are written: all, or those up to the first end where the decoder looks for one."""
    start = recorded.prompts.shape[1]
    canvas = row[start : start + recorded.length].tolist()
    if recorded.mask not in canvas:
        return True
    written = canvas[: canvas.index(recorded.mask)]
    return _slides(recorded) and any(token in recorded.eos for token in written)


def _cut(recorded: Recorded, ids: Tensor) -> Tensor:
    """Up to the limit, and to the first end where the decoder looks for one."""
    start = recorded.prompts.shape[1]
    ids = ids[:, : start + recorded.length]
    ends = torch.isin(ids[0, start:], torch.tensor(recorded.eos)).nonzero().flatten()
    return ids[:, : start + int(ends[0]) + 1] if len(ends) and _slides(recorded) else ids


def made_up(seed: int) -> Recorded:
    """The window and the blocks in turns."""
    rng, generator = random.Random(f"wedlm {seed}"), torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": rng.randint(1, 20)}
    if seed % 2:
        settings["wedlm_window_size"] = rng.choice([1, 2, 4, 7, 16])
        settings["entropy_threshold"] = rng.choice([None, 0.2, 0.6, 1.2])
        settings["pos_penalty_factor"] = rng.choice([0.0, 0.02, 0.2])
    else:
        settings["block_size"] = rng.choice([1, 3, 4, 8])
        settings["confidence_threshold"] = rng.choice([0.0, 0.3, 0.6, 0.9])
        settings["temperature"] = rng.choice([1.0, 1.0, 0.7])
    prompts = torch.randint(0, 62, (1, rng.randint(1, 10)), generator=generator)
    case = Case(folder(), "wedlm_made_up" if seed % 2 else "wedlmblock_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
