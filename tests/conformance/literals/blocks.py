"""Block models' own samplers, on checkpoints of `models/`: SDAR, LLaDA2.0 and LLaDA2.1 with its editing.

Blocks lie on a grid from position 0, so that a prompt may end inside one. Forwards that only store keys and values are
left out of SDAR's records: ours keeps none in these runs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.loading import load_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.noise import inverse_cdf
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case, folder
from tests.conformance.samplers import Literal, Recorded, Run, rows_of

PART_OF_A_BLOCK = (
    "where the prompt ends inside a block the reference shares out the whole block over the steps; here what is open"
)


def record(case: Case) -> Recorded:
    """The record with whole rows as states, as they were before each forward that wrote something."""
    found = Recorded.of(case)
    assert found.forwards is not None and len(found.prompts) == 1
    width, forwards = _width(found), []
    events = case.outputs.get("events") or []
    stores = {number for number, event in enumerate(events) if event.get("kind") == "store"}
    for number, fed in enumerate(found.forwards):
        if number in stores:
            continue
        start = events[number]["fed"][0] if case.family == "sdar" else 0
        row = torch.full((1, width), found.mask)
        row[:, :start] = found.ids[:, :start]
        row[:, start : start + fed.shape[1]] = fed
        forwards.append(row)
    return dataclasses.replace(found, forwards=forwards, nfe=len(forwards))


def model(recorded: Recorded) -> tuple[Any, DiffusionSpec]:
    """The checkpoint that the case names, with the case's block length."""
    settings = recorded.case.settings
    return _model(settings["model"], settings["block_length"], settings["mask_id"], recorded.case.compute_dtype)


@functools.lru_cache(maxsize=8)
def _model(name: str, block_length: int, mask: int, dtype: str) -> tuple[Any, DiffusionSpec]:
    denoiser = load_denoiser(folder() / "models" / name, dtype=getattr(torch, dtype), mask_token_id=mask)
    denoiser.config.diffusion = {**denoiser.config.diffusion, "block_length": block_length}
    return attach_scoring(denoiser.eval()), DiffusionSpec.of(denoiser)


def config(recorded: Recorded) -> DecodingConfig:
    case, settings = recorded.case, recorded.case.settings
    canvas, size = _width(recorded) - recorded.prompts.shape[1], recorded.block_length
    schedule, arguments = "sdar_dynamic", {"threshold": _threshold(recorded)}
    if settings.get("remasking_strategy") == "sequential":
        schedule, arguments = "left_to_right", {}
    if case.family == "llada21gen":
        names = ("threshold", "editing_threshold", "max_post_steps")
        schedule, arguments = "editing", {name: settings[name] for name in names}
    return DecodingConfig(
        canvas_length=canvas,
        schedule=schedule,
        schedule_args=arguments,
        steps=_steps(recorded) * -(-canvas // size),
        temperature=settings["temperature"] if settings.get("draw") == "inverse_cdf" else 0.0,
        top_k=settings.get("top_k") or 0,
        top_p=settings.get("top_p") or 1.0,
        stop_at_eos=False if case.family == "sdar" else "block",
    )


def noise(recorded: Recorded) -> _Uniforms | None:
    return _Uniforms(recorded) if recorded.case.settings.get("draw") == "inverse_cdf" else None


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout, cut where the reference cuts."""
    run = rows_of(recorded, rollout)
    return dataclasses.replace(run, ids=_cut(recorded, run.ids))


class _Uniforms:
    """A `NoiseSource` that draws with the uniforms of each forward's block."""

    def __init__(self, recorded: Recorded) -> None:
        self.values: list[list[float]] = recorded.case.noise["uniforms_per_draw"]
        self.before, self.size = recorded.prompts.shape[1], recorded.block_length

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        raise AssertionError(f"the references draw no {purpose!r}")

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        keys = zip(steps.tolist(), positions.tolist(), strict=True)
        found = [
            self.values[min(step, len(self.values) - 1)][(self.before + position) % self.size]
            for step, position in keys
        ]
        return inverse_cdf(probabilities, torch.tensor(found, dtype=torch.float64))


def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    if recorded.case.family == "llada21gen":
        return Literal(recorded.ids)  # nothing may differ
    found = _sampled(recorded, whole_block=deviations)
    if deviations:
        ours = _sampled(recorded, whole_block=False)
        states = [torch.equal(a, b) for a, b in zip(found.states, ours.states, strict=False)]
        if len(found.states) != len(ours.states) or not all(states) or not torch.equal(found.ids, ours.ids):
            found.rules.add(PART_OF_A_BLOCK)
    return found


def _sampled(recorded: Recorded, *, whole_block: bool) -> Literal:
    settings, mask, size = recorded.case.settings, recorded.mask, recorded.block_length
    prompt, steps = recorded.prompts.shape[1], _steps(recorded)
    ids = torch.full((_width(recorded),), mask)
    ids[:prompt] = recorded.prompts[0]
    drawn, threshold, ends = noise(recorded), _threshold(recorded), recorded.eos
    sequential = settings.get("remasking_strategy") == "sequential"
    states: list[Tensor] = []
    for first in range(prompt // size * size, len(ids), size):
        part = slice(first, first + size)
        shared = size if whole_block else int((ids[part] == mask).sum())
        for step in range(steps):
            masked = ids[part] == mask
            if not bool(masked.any()):
                break
            states.append(ids.clone()[None])
            logits = _logits(recorded, ids[: first + size], size)[part]
            probabilities = _filtered(logits, settings)
            token = logits.argmax(-1)
            if drawn is not None:
                places = torch.arange(first, first + size) - prompt
                at = torch.full_like(places, len(states) - 1)
                token = drawn.draw(probabilities, torch.zeros_like(places), at, places)
            confidence = probabilities.gather(-1, token[:, None])[:, 0].masked_fill(~masked, -torch.inf)
            due = shared // steps + (step < shared % steps)
            sure = confidence > threshold
            if sequential:
                chosen = masked & (masked.cumsum(-1) <= due)
            elif int(sure.sum()) >= due:
                chosen = sure
            else:
                best = confidence.argsort(descending=True, stable=True)[: min(due, int(masked.sum()))]
                chosen = torch.zeros_like(masked)
                chosen[best] = True
            ids[part] = torch.where(chosen, token, ids[part])
        written = ids[prompt : first + size]
        ended = torch.isin(written, torch.tensor(ends)) & (written != mask)
        if recorded.case.family != "sdar" and bool(ended.any()):
            break
    return Literal(_cut(recorded, ids[None]), states, states, [torch.ones(1).bool()] * len(states))


@torch.no_grad()
def _logits(recorded: Recorded, ids: Tensor, size: int) -> Tensor:
    """`[n, V]` of a row up to the end of a block, of which each block sees itself and those before it."""
    block = torch.arange(len(ids)) // size
    sees = block[:, None] >= block
    return model(recorded)[0](
        input_ids=ids[None],
        attention_mask=sees[None, None],
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
    ).logits[0]


def _filtered(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    logits = logits / (settings.get("temperature") or 1.0)
    if settings.get("top_k"):
        least = logits.topk(settings["top_k"]).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if (settings.get("top_p") or 1.0) < 1:
        values, order = logits.sort(descending=True)
        reached = values.softmax(-1).cumsum(-1) - values.softmax(-1) > settings["top_p"]
        logits = logits.masked_fill(torch.zeros_like(reached).scatter(-1, order, reached), -torch.inf)
    return logits.softmax(-1)


def _width(recorded: Recorded) -> int:
    """Positions of the whole blocks that hold prompt and canvas."""
    return -(-(recorded.prompts.shape[1] + recorded.length) // recorded.block_length) * recorded.block_length


def _steps(recorded: Recorded) -> int:
    """Steps of a block; LLaDA2.1 fills so many slots at each, if no more are sure."""
    settings = recorded.case.settings
    if "num_to_transfer" in settings:
        return -(-recorded.block_length // settings["num_to_transfer"])
    return settings.get("denoising_steps") or settings["steps"]


def _threshold(recorded: Recorded) -> float:
    """Above 1 where the reference has none."""
    settings = recorded.case.settings
    if settings.get("remasking_strategy", "dynamic").endswith("dynamic"):
        return settings.get("confidence_threshold", settings.get("threshold", 2.0))
    return 2.0


def _cut(recorded: Recorded, ids: Tensor) -> Tensor:
    """LLaDA2 returns what was asked for, up to its first end."""
    if recorded.case.family == "sdar":
        return ids
    prompt = recorded.prompts.shape[1]
    ids = ids[:, : prompt + recorded.length]
    ends = torch.isin(ids[0, prompt:], torch.tensor(recorded.eos)).nonzero().flatten()
    return ids[:, : prompt + int(ends[0]) + 1] if len(ends) else ids
