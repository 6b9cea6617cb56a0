"""Schedules of one-row records that write several tokens at a time: WINO, KLASS, Saber, PC-Sampler, the entropy bound,
and Learn2PD.

Each literal is a generator of states: it yields the row before a forward and gets the logits. `deviations` switches
between the released code's rule and ours.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.learn2pd import TokenFilter, save_filter
from tests.conformance.cases import Case
from tests.conformance.denoisers import denoiser
from tests.conformance.literals.tools import blank
from tests.conformance.samplers import Literal, Recorded

HISTORY = (
    "KLASS's released code compares a block's first step with the last one of the block before, and leaves masks when "
    "the steps are over; here a block has a history of its own, and decoding goes on"
)
SHADOWS = "WINO's released code lets the shadows of a block see one another; here each sees the real slots alone"
FALL = (
    "Saber's released code measures the fall of whatever is most probable in a slot, also of tokens of this step and "
    "of earlier blocks; here it is the fall of the token held, in the active block"
)

Steps = Generator[Tensor, Tensor, Tensor]
"""Yields states `[T]`, gets logits `[T (+ b), V]`, and returns the row."""


def record(case: Case) -> Recorded:
    """The record without the shadows that WINO feeds along."""
    found = Recorded.of(case)
    width = found.ids.shape[1]
    return dataclasses.replace(found, forwards=found.forwards and [f[:, :width] for f in found.forwards])


def config(recorded: Recorded) -> DecodingConfig:
    settings, family = recorded.case.settings, recorded.case.family
    shared = {"canvas_length": recorded.length, "block_length": recorded.block_length, "stop_at_eos": False}
    if family == "wino":
        arguments = {"threshold": settings["threshold"], "verify_threshold": settings["threshold_back"]}
        return DecodingConfig(**shared, schedule="wino", schedule_args=arguments)
    if family == "klass":
        arguments = {
            "threshold": settings["conf_threshold"],
            "kl_threshold": settings["kl_threshold"],
            "history": settings["kl_history_length"],
        }
        return DecodingConfig(**shared, steps=settings["steps"], schedule="klass", schedule_args=arguments)
    if family == "saber":
        return DecodingConfig(**shared, schedule="saber", schedule_args={"min_tokens": settings["n"]})
    if family == "pcsampler":
        counts = dict(enumerate(recorded.case.inputs["background_counts"]))
        total = recorded.case.inputs["background_total"]
        table = {"num_token": total, "p_baseline_dict": counts}
        folder = Path(tempfile.mkdtemp())
        (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")
        arguments = {
            "frequencies": str(folder / "table.json"),
            "decay": settings["lambd"],
            "alpha": float(settings["alpha"]),
        }
        return DecodingConfig(**shared, steps=settings["steps"], schedule="pc_sampler", schedule_args=arguments)
    if family == "learn2pd":
        arguments = {"filter_path": _saved_filter(recorded), "acceptance": settings["accept_thres"]}
        return DecodingConfig(**shared, schedule="learn2pd", schedule_args=arguments)
    shared["block_length"] = None
    return DecodingConfig(**shared, schedule="entropy_bound", schedule_args={"gamma": settings["gamma"]})


def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    family = recorded.case.family
    if family not in SAMPLERS:
        return Literal(recorded.ids)  # nothing may differ
    sampler, rule = SAMPLERS[family]
    found = _run(recorded, sampler, deviations)
    if deviations:
        ours = _run(recorded, sampler, False)
        states = [torch.equal(a, b) for a, b in zip(found.states, ours.states, strict=False)]
        if len(found.states) != len(ours.states) or not all(states) or not torch.equal(found.ids, ours.ids):
            found.rules.add(rule)
    return found


def _run(recorded: Recorded, sampler: Callable[[Recorded, bool], Steps], deviations: bool) -> Literal:
    assert len(recorded.prompts) == 1, "records of these families have one row"
    steps, states = sampler(recorded, deviations), []
    shadows = recorded.case.family == "wino"
    logits: Tensor | None = None
    try:
        state = next(steps)
        while True:
            states.append(state.clone()[None])
            logits = _shadowed(recorded, state, deviations) if shadows else _plain(recorded, state)
            state = steps.send(logits)
    except StopIteration as stop:
        ids = stop.value[None]
    return Literal(ids, states, states, [torch.ones(1).bool()] * len(states))


@torch.no_grad()
def _plain(recorded: Recorded, ids: Tensor) -> Tensor:
    keys = torch.cat([recorded.keys, torch.ones(1, recorded.length).bool()], dim=1)
    mask = keys[:, None, None, :].expand(-1, 1, len(ids), -1)
    return denoiser(recorded.case)(
        input_ids=ids[None], attention_mask=mask, position_ids=torch.arange(len(ids))[None], use_cache=False
    ).logits[0]


@torch.no_grad()
def _shadowed(recorded: Recorded, ids: Tensor, see_one_another: bool) -> Tensor:
    """Logits of the row and behind it of the shadows of its first block with masks."""
    size, width = recorded.block_length, len(ids)
    first = _first_open(recorded, ids)
    mask = torch.ones(width + size, width + size).bool()
    mask[:width, width:] = False
    mask[width:, first : first + size] = ~torch.eye(size).bool()
    if not see_one_another:
        mask[width:, width:] = torch.eye(size).bool()
    fed = torch.cat([ids, ids.new_full((size,), recorded.mask)])
    positions = torch.cat([torch.arange(width), torch.arange(first, first + size)])
    return denoiser(recorded.case)(
        input_ids=fed[None], attention_mask=mask[None, None], position_ids=positions[None], use_cache=False
    ).logits[0]


def _first_open(recorded: Recorded, ids: Tensor) -> int:
    start = recorded.prompts.shape[1]
    place = int((ids[start:] == recorded.mask).nonzero()[0])
    return start + place // recorded.block_length * recorded.block_length


def _best(values: Tensor, allowed: Tensor, count: int) -> Tensor:
    """bool: the largest allowed values, as many as there are."""
    chosen = torch.zeros_like(allowed)
    order = values.masked_fill(~allowed, -torch.inf).argsort(descending=True, stable=True)
    chosen[order[: min(count, int(allowed.sum()))]] = True
    return chosen


def _even(slots: int, steps: int, step: int) -> int:
    return slots // steps + (step < slots % steps) if step < steps else 0


def _wino(recorded: Recorded, deviations: bool) -> Steps:
    settings, ids = recorded.case.settings, blank(recorded)[0]
    size, before, block = recorded.block_length, 30, -1
    while bool((ids == recorded.mask).any()):
        first = _first_open(recorded, ids)
        if first != block:
            block, before = first, 30
        logits = yield ids
        part = slice(first, first + size)
        masked = ids[part] == recorded.mask
        confidence, token = logits[part].softmax(-1).max(-1)
        held = logits[len(ids) :].softmax(-1).gather(-1, ids[part, None])[:, 0]
        cap = min(max(int(int(masked.sum()) * 0.7), 5), 20)
        sure = int((masked & (confidence > settings["threshold"])).sum())
        drafted = _best(confidence, masked, max(1, min(sure, cap)))
        doubtful = ~masked & (held < settings["threshold_back"])
        again = _best(-held, doubtful, before - 1) if int(drafted.sum()) > 1 else torch.zeros_like(doubtful)
        ids = ids.clone()
        ids[part] = torch.where(again, recorded.mask, torch.where(drafted, token, ids[part]))
        before = int(drafted.sum())
    return ids


def _klass(recorded: Recorded, deviations: bool) -> Steps:
    settings, ids = recorded.case.settings, blank(recorded)[0]
    size, span = recorded.block_length, settings["kl_history_length"]
    start, steps = recorded.prompts.shape[1], settings["steps"] * recorded.block_length // recorded.length
    moved = torch.zeros(span, len(ids), dtype=torch.float64)  # divergences of the last steps
    last = torch.zeros(1)
    for first in range(start, len(ids), size):
        inside = torch.zeros(len(ids)).bool()
        inside[first : first + size] = True
        step = 0
        while bool((masked := inside & (ids == recorded.mask)).any()) and (step < steps or not deviations):
            logits = yield ids
            now = logits.softmax(-1)
            confidence, token = now.max(-1)
            if deviations:
                before = torch.zeros_like(now) if last.dim() == 1 else last
                change = (now * ((now + 1e-12).log() - (before + 1e-12).log())).sum(-1)
                early = step < span - 1
            else:
                change = torch.full((len(ids),), torch.inf, dtype=now.dtype)
                if step:
                    change = (now * (now.log() - last.log())).sum(-1)
                early = step < span
            moved, last = torch.cat([moved[1:], change[None]]), now
            calm = (moved < settings["kl_threshold"]).all(0)
            chosen = masked & calm & (confidence > settings["conf_threshold"])
            if early or not bool(chosen.any()):
                share = _even(size, steps, step)
                chosen = _best(confidence, masked, share if deviations else max(1, share))
            ids = torch.where(chosen, token, ids)
            step += 1
    return ids


def _saber(recorded: Recorded, deviations: bool) -> Steps:
    least, ids = recorded.case.settings["n"], blank(recorded)[0]
    start, size = recorded.prompts.shape[1], recorded.block_length
    places = torch.arange(len(ids))
    accepted = torch.full((len(ids),), -1.0, dtype=torch.float64)  # confidences at acceptance
    before: Tensor | None = None
    for end in range(start + size, len(ids) + 1, size):
        while True:
            masked = (ids == recorded.mask) & (places < end) & (places >= start)
            logits = yield ids
            probabilities = logits.softmax(-1)
            confidence, token = probabilities.max(-1)
            known = accepted[accepted >= 0]
            bar = float(known.mean()) if len(known) else 1.0
            if deviations and len(known):
                bar = float(known.float().mean())
            sure = int((masked & (confidence > bar)).sum())
            chosen = _best(confidence, masked, max(sure, least))
            accepted = torch.where(chosen, confidence, accepted)
            written = torch.where(chosen, token, ids)
            if deviations:
                now = torch.where(places < end, confidence, -torch.inf)
                rise = now - (torch.zeros_like(now) if before is None else before)
                fall = torch.where(rise.isfinite(), -rise, -torch.inf)
                candidates = (places >= start) & (places < end) & (written != recorded.mask)
            else:
                held = probabilities.gather(-1, ids[:, None])[:, 0]
                now = torch.where(chosen, confidence, held)
                fall = torch.zeros_like(now) if before is None else before - now
                candidates = (places >= end - size) & (places < end) & (ids != recorded.mask)
            before, ids = now, written
            if not bool((ids[start:end] == recorded.mask).any()):
                break
            number = int(chosen.sum())
            back = min(max(least // 2, (number + 7) // 8), number - 1)
            ids = torch.where(_best(fall, candidates, back), recorded.mask, ids)
    return ids


SAMPLERS: dict[str, tuple[Callable[[Recorded, bool], Steps], str]] = {
    "wino": (_wino, SHADOWS),
    "klass": (_klass, HISTORY),
    "saber": (_saber, FALL),
}


def _saved_filter(recorded: Recorded) -> str:
    weights = {name: torch.tensor(value) for name, value in recorded.case.inputs["filter"].items()}
    network = TokenFilter(recorded.block_length, len(weights["b1"]))
    linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for module, number in zip(linear, ("1", "2"), strict=True):
            module.weight.copy_(weights[f"W{number}"])
            module.bias.copy_(weights[f"b{number}"])
    path = Path(tempfile.mkdtemp()) / "filter.safetensors"
    save_filter(network, path, temperature=0.0, cache="none")
    return str(path)
