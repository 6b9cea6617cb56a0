"""MDPO's sampler, with and without running confidence remasking."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import top
from rl4dlm.rollout.schedules.rcr import still_masked
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import (
    IDLE_STEPS,
    MASK_DRAWN,
    MASK_IN_PROMPT,
    TIES,
    Forwards,
    at,
    best,
    blank,
    padded,
)
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise, gumbel, recorded_noise

COUNT_ROUNDING = (
    "the reference rounds products down that are whole numbers but for floating point, so that one slot fewer stays "
    "open; here they count as whole"
)
FILTER_ORDER = "the reference filters by top-p and then by top-k; here top-k goes first, as everywhere in the library"
ROUNDED_CONFIDENCE = "the reference stores confidences in float32, where nearly equal ones may change places"
ZERO_CONFIDENCE = "a stored confidence of exactly 0 counts as 'never predicted' in the reference, as certain as can be"

CONFIDENCES = {"topk_margin": "topk_margin", "entropy": "entropy"}
"""The reference's `conf_alg` to ours; any other is the probability."""


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    counts, exponent = _counts(settings.get("mode", "linear"))
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule="rcr",
        steps=recorded.steps_per_block * (recorded.length // recorded.block_length),
        temperature=recorded.temperature,
        top_p=settings.get("top_p") or 1.0,
        top_k=settings.get("top_k") or 0,
        stop_at_eos=False,
        schedule_args={
            "confidence": CONFIDENCES.get(settings.get("conf_alg", ""), "probability"),
            "counts": counts,
            "exponent": exponent,
            "remask": bool(settings.get("rcr")),
        },
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    return _Noise(recorded) if recorded.case.noise else None


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    settings, mask = recorded.case.settings, recorded.mask
    width, steps, mode = recorded.prompts.shape[1], recorded.steps_per_block, settings.get("mode", "linear")
    ids = blank(recorded)
    open_slots = torch.arange(ids.shape[1]).expand_as(ids) >= width  # what "masked" means without the deviations
    stored, predicted = torch.zeros(ids.shape).double(), torch.zeros_like(ids).bool()
    result = Literal(ids)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    tokens, _ = recorded_noise(recorded)
    model = Forwards(recorded)
    for low in range(width, ids.shape[1], recorded.block_length):
        high = low + recorded.block_length
        masked_at_start = ((ids == mask) if deviations else open_slots)[:, low:high].sum(-1)
        left = [_left(int(n), steps, mode, deviations, result.rules) for n in masked_at_start]  # [B][steps]
        for step in range(steps):
            masked = (ids == mask) if deviations else open_slots
            eligible = masked.clone()
            eligible[:, high:] = False
            result.states.append(ids.clone())
            result.forwards.append(ids.clone())
            result.wrote.append(eligible.any(-1))
            uniforms = at(tokens, len(result.forwards) - 1) if recorded.temperature else None
            drawn, confidence = _predict(model(ids), recorded, uniforms, ids, deviations, result.rules)
            if bool(((drawn == mask) & eligible).any()):
                result.rules.add(MASK_DRAWN)
            confidence = confidence.masked_fill(~eligible, -torch.inf)
            after = torch.tensor([row[step] for row in left])
            before = torch.tensor([row[step - 1] for row in left]) if step else masked_at_start
            # With remasking everything is written that the counts leave for this step and those to come.
            counts = before if settings.get("rcr") else before - after
            commit = best(confidence, eligible, counts, deviations=deviations, rules=result.rules)
            ids[commit] = torch.where(masked, drawn, ids)[commit]
            open_slots = open_slots & ~commit
            if not settings.get("rcr"):
                continue
            stored[commit], predicted = confidence[commit].double(), predicted | commit
            if bool((predicted & (stored == 0)).any()):
                result.rules.add(ZERO_CONFIDENCE)
            if step == steps - 1:
                continue
            taken = _least(stored, predicted, after)
            if deviations:
                rounded = torch.where(stored == 0, 1.0, stored.float())
                if not torch.equal(_least(rounded, predicted, after), taken):
                    result.rules.add(ROUNDED_CONFIDENCE)
                taken = torch.zeros_like(taken)
                for row, count in enumerate(after.tolist()):
                    taken[row, rounded[row].topk(count, largest=False).indices] = True
                if not torch.equal(_least(rounded, predicted, after), taken):
                    result.rules.add(TIES)
            ids[taken] = mask
            open_slots = open_slots | taken
    if not all(bool(wrote.all()) for wrote in result.wrote):
        result.rules.add(IDLE_STEPS)
    return result


def _least(confidence: Tensor, predicted: Tensor, counts: Tensor) -> Tensor:
    """bool `[B, T]`, the least confident of what was predicted; of equal ones the lower position is kept."""
    return predicted & ~top(confidence, predicted, predicted.sum(-1) - counts)


def _predict(
    logits: Tensor, recorded: Recorded, uniforms: Tensor | None, ids: Tensor, deviations: bool, rules: set[str]
) -> tuple[Tensor, Tensor]:
    """Candidates and confidences `[B, T]`."""
    settings = recorded.case.settings
    top_p, top_k = settings.get("top_p") or 1.0, settings.get("top_k") or 0
    if deviations and top_p < 1 and top_k:
        rules.add(FILTER_ORDER)
    logits = logits / (recorded.temperature or 1.0)
    probabilities = _filtered(logits, top_p, top_k, deviations).softmax(-1)
    choices = probabilities
    if not deviations:
        without = logits.clone()
        without[..., recorded.mask] = -torch.inf
        choices = _filtered(without, top_p, top_k, deviations).softmax(-1)
    noise = padded(gumbel(uniforms), ids) if uniforms is not None else 0.0
    drawn = (choices.log() + noise).argmax(-1)
    kind = settings.get("conf_alg")
    if kind == "entropy":
        return drawn, (probabilities * (probabilities + 1e-10).log()).sum(-1)
    if kind == "topk_margin":
        ordered = probabilities.sort(descending=True, dim=-1).values
        return drawn, ordered[..., 0] - ordered[..., 1]
    return drawn, probabilities.gather(-1, drawn[..., None]).squeeze(-1)


def _filtered(logits: Tensor, top_p: float, top_k: int, deviations: bool) -> Tensor:
    filters = [lambda x: _top_p(x, top_p), lambda x: _top_k(x, top_k)]
    for one in filters if deviations else filters[::-1]:
        logits = one(logits)
    return logits


def _top_k(logits: Tensor, top_k: int) -> Tensor:
    if not top_k:
        return logits
    return logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -torch.inf)


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    return logits.masked_fill((before > top_p).gather(-1, places.argsort()), -torch.inf)


def _counts(mode: str) -> tuple[str, float]:
    """Our name of a count schedule, and the exponent that the reference has in it."""
    return ("pow", float(mode.removeprefix("pow") or 2)) if mode.startswith("pow") else (mode, 2.0)


def _share(kind: str, exponent: float, done: float, bits: float) -> float:
    """Which share of the slots stays open when a share of the steps is done."""
    if kind == "linear":
        return 1 - done
    if kind == "cosine":
        return math.cos(math.pi / 2 * done)
    if kind == "pow":
        return 1 - done**exponent
    return -math.log2(done) / bits if kind == "log" else 1 - 2 ** (-bits * (1 - done))


def _left(masked: int, steps: int, mode: str, deviations: bool, rules: set[str]) -> list[int]:
    """How many slots stay open after each step."""
    kind, exponent = _counts(mode)
    left = []
    for step in range(steps):
        done = (step + 1) / steps
        product = masked * min(max(_share(kind, exponent, done, math.log2(max(masked, 2))), 1e-6), 1.0)
        whole = abs(product - round(product)) < 1e-9
        if whole and math.floor(product) < round(product):
            rules.add(COUNT_ROUNDING)
        left.append(round(product) if whole and not deviations else math.floor(product))
    return left


class _Noise(ReplayedNoise):
    """Steps of a block that leave nothing open come last; ours are those before."""

    def forward_of(self, row: int, step: int, position: int) -> int:
        recorded, steps = self.recorded, self.recorded.steps_per_block
        left = _left(recorded.block_length, steps, recorded.case.settings.get("mode", "linear"), False, set())
        working = left.index(0) + 1
        return step // working * steps + step % working


def check_counts(case: Case) -> None:
    """The reference's table, which ours equals but for its rounding."""
    assert case.outputs["table"]
    for entry in case.outputs["table"]:
        steps, mode = entry["steps"], entry["mode"]
        rows = torch.tensor(entry["masked"]).view(-1).tolist()
        for masked, recorded in zip(rows, torch.tensor(entry["counts"]).view(-1, steps).tolist(), strict=True):
            theirs = _left(masked, steps, mode, True, set())
            assert recorded == [a - b for a, b in zip([masked, *theirs], theirs, strict=False)], entry
            counts, exponent = _counts(mode)
            ours = still_masked(torch.tensor([masked]), steps, torch.arange(steps), counts, exponent)
            assert ours.tolist() == _left(masked, steps, mode, False, set()), entry


def made_up(seed: int) -> Recorded:
    """A case of one row with random settings."""
    rng, generator = random.Random(f"mdpo {seed}"), torch.Generator().manual_seed(seed)
    blocks, block_length = rng.randint(1, 3), rng.choice([1, 2, 5, 8, 10])
    settings: dict[str, Any] = {
        "gen_length": blocks * block_length,
        "block_length": block_length,
        "steps": blocks * rng.choice([1, 2, block_length, block_length + 2]),
        "temperature": rng.choice([0.0, 0.0, 0.4, 1.0]),
        "conf_alg": rng.choice(["confidence", "topk_margin", "entropy"]),
        "mode": rng.choice(["linear", "cosine", "pow2", "log", "exp"]),
        "rcr": seed % 3 > 0,
        "top_p": rng.choice([None, None, 0.9]),
        "top_k": rng.choice([None, None, 5]),
    }
    width = rng.randint(1, 12)
    prompts = torch.randint(0, 62, (1, width), generator=generator)
    total = width + settings["gen_length"]
    noise = {"tokens": torch.rand(60, 1, total, 64, generator=generator, dtype=torch.float64).tolist()}
    case = Case(folder(), "mdpo_made_up", {"function": "diffusion_generate"}, settings, {}, noise, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
