"""Dream's sampler, and Fast-dLLM's threshold in it."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import top
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import IDLE_STEPS, MASK_DRAWN, MASK_IN_PROMPT, Forwards, best, blank
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise

DEFAULT_EPS, DEFAULT_THRESHOLD = 1e-3, 0.9

SHARED_COUNT = "the reference writes the same number of tokens in every row, from their mean number of masks"
FILTER_ORDER = "the reference filters by top-p and then by top-k; here top-p is that of what top-k leaves"
ENTROPY_OFFSET = "the reference adds 1e-10 to probabilities before the logarithm of the entropy"


def config(recorded: Recorded) -> DecodingConfig:
    settings, alg = recorded.case.settings, recorded.case.settings["alg"]
    arguments: dict[str, Any] = {"eps": settings.get("eps", DEFAULT_EPS)}
    if alg == "confidence_threshold":
        arguments = {"threshold": settings.get("threshold", DEFAULT_THRESHOLD)}
    elif alg != "origin":
        arguments["counts"] = "floor"
    return DecodingConfig(
        canvas_length=recorded.length,
        schedule="dream_" + alg.removeprefix("confidence_"),
        steps=settings["steps"],
        temperature=recorded.temperature,
        top_p=settings.get("top_p") or 1.0,
        top_k=settings.get("top_k") or 0,
        stop_at_eos=False,
        schedule_args=arguments,
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    return _Noise(recorded) if recorded.case.noise else None


class _Noise(ReplayedNoise):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__(recorded)
        if not self.order:
            assert recorded.forwards is not None, "recorded numbers belong to masked positions, which are not recorded"
            self.order = [
                _placed(values, state == recorded.mask)
                for values, state in zip(_per_mask(recorded), recorded.forwards, strict=True)
            ]


def _per_mask(recorded: Recorded) -> list[Tensor]:
    """Per forward, one number per masked position in row-major order."""
    return [torch.tensor(step, dtype=torch.float64) for step in recorded.case.noise.get("rand_per_step", ())]


def _placed(values: Tensor, masked: Tensor) -> Tensor:
    return torch.zeros(masked.shape, dtype=values.dtype).masked_scatter(masked, values)


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    settings, mask, alg = recorded.case.settings, recorded.mask, recorded.case.settings["alg"]
    assert not recorded.temperature and not settings.get("alg_temp"), "draws of this sampler are not known"
    ids, width, steps = blank(recorded), recorded.prompts.shape[1], settings["steps"]
    open_slots = torch.arange(ids.shape[1]).expand_as(ids) >= width  # what "masked" means without the deviations
    result = Literal(ids)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    times = torch.linspace(1, settings.get("eps", DEFAULT_EPS), steps + 1)
    order, per_mask = ReplayedNoise(recorded).order, _per_mask(recorded)
    budget, carried = recorded.length // steps, 0
    model, step = Forwards(recorded), 0
    while step < steps:
        masked = (ids == mask) if deviations else open_slots
        result.states.append(ids.clone())
        result.forwards.append(ids.clone())
        result.wrote.append(masked.any(-1))
        logits = model(ids)
        drawn = (logits if deviations else _without(logits, mask)).argmax(-1)
        if bool(((drawn == mask) & masked).any()):
            result.rules.add(MASK_DRAWN)
        probabilities, ours = (_filtered(logits, recorded, as_released) for as_released in (True, False))
        if deviations and not torch.equal(probabilities[masked] > 0, ours[masked] > 0):
            result.rules.add(FILTER_ORDER)
        scores = _scores(alg, probabilities if deviations else ours, drawn, deviations)
        scores = scores.masked_fill(~masked, -torch.inf)

        last = step == steps - 1
        share = torch.tensor(1.0) if last else 1 - times[step + 1] / times[step]
        if alg == "origin":
            uniform = order[step] if order else _placed(per_mask[step], masked)
            commit = masked & (uniform.float() < share)
        elif alg == "confidence_threshold":
            count, carried = budget + carried, 0
            commit = best(scores, masked, torch.tensor([count]), deviations=deviations, rules=result.rules)
            first = best(scores, masked, torch.tensor([1]), deviations=deviations, rules=result.rules)
            failed = commit & ~first & (scores < settings.get("threshold", DEFAULT_THRESHOLD))
            commit, carried = commit & ~failed, int(failed.sum())
            if last and carried:
                budget, steps = 0, steps + 1
        else:
            number = masked.sum() / len(ids) if deviations else masked.sum(-1).float()
            counts = (number * share).long().expand(len(ids))
            if deviations and bool((masked.sum(-1) != number).any()):
                result.rules.add(SHARED_COUNT)
            if deviations and alg == "entropy":
                exact = _scores(alg, probabilities, drawn, False).masked_fill(~masked, -torch.inf)
                if not torch.equal(top(exact, masked, counts), top(scores, masked, counts)):
                    result.rules.add(ENTROPY_OFFSET)
            commit = best(scores, masked, counts, deviations=deviations, rules=result.rules)
        ids[commit] = torch.where(masked, drawn, mask)[commit]
        open_slots = open_slots & ~commit
        step += 1
    if not all(bool(wrote.all()) for wrote in result.wrote):
        result.rules.add(IDLE_STEPS)
    return result


def _without(logits: Tensor, token: int) -> Tensor:
    logits = logits.clone()
    logits[..., token] = -torch.inf
    return logits


def _filtered(logits: Tensor, recorded: Recorded, as_released: bool) -> Tensor:
    """Probabilities `[B, T, V]` that top-p and top-k leave, renormalised."""
    top_p, top_k = recorded.case.settings.get("top_p"), recorded.case.settings.get("top_k")
    filters = [_top_p, _top_k] if as_released else [_top_k, _top_p]
    for keep, limit in zip(filters, [top_p, top_k] if as_released else [top_k, top_p], strict=True):
        if limit is not None and limit > 0:
            logits = logits.masked_fill(~keep(logits, limit), -torch.inf)
    return logits.softmax(-1)


def _top_p(logits: Tensor, limit: float) -> Tensor:
    """The smallest set of tokens whose probability exceeds the limit."""
    ordered, tokens = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1).roll(1, -1)
    before[..., 0] = 0.0
    return torch.zeros_like(before, dtype=torch.bool).scatter(-1, tokens, (before <= limit) | (limit >= 1))


def _top_k(logits: Tensor, limit: int) -> Tensor:
    return logits >= logits.topk(min(limit, logits.shape[-1]), dim=-1).values[..., -1:]


def _scores(alg: str, probabilities: Tensor, drawn: Tensor, deviations: bool) -> Tensor:
    if alg == "topk_margin":
        two = probabilities.topk(2, dim=-1).values
        return two[..., 0] - two[..., 1]
    if alg == "entropy":
        logs = (probabilities + 1e-10).log() if deviations else probabilities.clamp(min=1e-300).log()
        return (probabilities * logs).sum(-1)
    return probabilities.gather(-1, drawn[..., None]).squeeze(-1)


def made_up(seed: int) -> Recorded:
    """A case of any of the rules, the seeds taking turns."""
    rng, generator = random.Random(f"dream {seed}"), torch.Generator().manual_seed(seed)
    alg = ("origin", "maskgit_plus", "topk_margin", "entropy", "confidence_threshold")[seed % 5]
    per_step, steps = rng.randint(1, 4), rng.randint(1, 8)
    alone = alg == "confidence_threshold"
    length = per_step * steps if alone else rng.randint(1, 14)
    rows, width = 1 if alone else rng.randint(1, 3), rng.randint(1, 12)
    settings: dict[str, Any] = {
        "alg": alg,
        "steps": steps if alone else rng.randint(1, length + 4),
        "max_new_tokens": length,
        "eps": rng.choice([1e-3, 0.1]),
        "top_p": rng.choice([None, 0.5, 0.9]),
        "top_k": rng.choice([None, 1, 4]),
    }
    if alone:
        settings["threshold"] = rng.choice([0.0, 0.5, 0.9, 2.0])
    prompts = torch.randint(0, 62, (rows, width), generator=generator)
    keys = torch.ones_like(prompts).bool()
    for row in range(rows):
        keys[row, : rng.randint(0, width - 1)] = False
    numbers = torch.rand(settings["steps"], rows, width + length, generator=generator)
    case = Case(folder(), "dream_made_up", {}, settings, {}, {"order": numbers.tolist()} if alg == "origin" else {}, {})
    return Recorded(case, prompts, keys, prompts, None, nfe=10**9)
