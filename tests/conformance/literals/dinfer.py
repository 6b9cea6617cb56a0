"""dInfer's loops over blocks: three decoders, with no cache, prefix and dual cache, and the refreshed vicinity."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from tests.conformance.cases import Case, folder
from tests.conformance.literals.llada import FULL_BLOCK
from tests.conformance.literals.tools import IDLE_STEPS, MASK_DRAWN, MASK_IN_PROMPT, Forwards, best, blank
from tests.conformance.samplers import Literal, Recorded

NEAR_BEST = (
    "where no candidate reaches the threshold the reference writes all within 1e-5 of the best one; here that one alone"
)
FLOAT32_CREDIT = "the reference keeps credit in float32"
REFRESHES = (
    "the reference counts iterations over the whole row, of which one that refreshes makes two forwards; here every "
    "n-th step of a block refreshes"
)
WARM_UP = (
    "the reference stores nothing while it warms up and so makes one more full forward then, which may be followed by "
    "another; here a step of the warm-up is a refresh, and so is the first step of every block"
)


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    schedule, arguments = "threshold", {"threshold": settings["threshold"]}
    if settings["decoder"] == "hierarchy":
        schedule, arguments["low_threshold"] = "hierarchical", settings["low_threshold"]
    if settings["decoder"] == "credit":
        names = {"weight": "credit_alpha", "power": "boost_gamma", "decay": "decay_beta"}
        schedule, arguments = "credit", {**arguments, **{ours: settings[theirs] for ours, theirs in names.items()}}
    cache, options = settings.get("cache_type") or "none", {}
    if _has_vicinity(settings):
        cache, options = "vicinity", {"before": settings["prefix_look"], "after": settings["after_look"]}
        options["warmup_steps"] = settings["warmup_steps"]
    if cache != "none" and settings.get("cache_update_freq"):
        options["refresh_steps"] = settings["cache_update_freq"]
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule=schedule,
        schedule_args=arguments,
        cache=cache,
        cache_args=options,
        stop_at_eos="block" if settings["early_stop"] else False,
    )


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    if not deviations:
        return _Ours(recorded).decode()
    found, ours = _Theirs(recorded).decode(), _Ours(recorded).decode()
    pairs = zip(found.working().fed or (), ours.forwards, strict=False)
    if any(len(mine[0]) != len(other[0]) for mine, other in pairs):
        settings = recorded.case.settings
        found.rules |= {REFRESHES} if settings.get("cache_update_freq") else set()
        found.rules |= {WARM_UP} if _has_vicinity(settings) else set()
    return found


class _Decoder:
    """The row, and what a forward of a block writes in it."""

    deviations: bool

    def __init__(self, recorded: Recorded) -> None:
        self.recorded, self.settings, self.mask = recorded, recorded.case.settings, recorded.mask
        self.ids, self.width = blank(recorded), recorded.prompts.shape[1]
        self.at = torch.arange(self.ids.shape[1])
        self.open = self.at >= self.width  # what "masked" means in the canvas
        self.result, self.model = Literal(self.ids), Forwards(recorded)
        self.credit: dict[int, tuple[Tensor, Tensor]] = {}  # block to float32 and float64 [b, V]
        if self.deviations and recorded.masks_in_prompt:
            self.result.rules.add(MASK_IN_PROMPT)

    def decode(self) -> Literal:
        """Block after block, until one holds an end."""
        for low in range(self.width, len(self.at), self.recorded.block_length):
            part = slice(low, low + self.recorded.block_length)
            self.block(part)
            ended = bool(torch.isin(self.ids[0, part], torch.tensor(self.recorded.eos)).any())
            if self.settings["early_stop"] and ended:
                self.ids[0, part.stop :] = self.recorded.eos[0]
                break
        return self.result

    def block(self, part: slice) -> None:
        raise NotImplementedError

    def step(self, part: slice, low: int, high: int, *, keep: bool) -> None:
        """A forward of columns `low` to `high`, and what it writes in the block."""
        masked = self.open[part]
        self.result.states.append(self.ids.clone())
        self.result.forwards.append(self.ids[:, low:high].clone())
        self.result.wrote.append(masked.any()[None])
        fed = (self.at >= low) & (self.at < high)
        logits = self.model.part(self.ids, fed, fed & keep)[0, part]
        if not bool(masked.any()):
            return
        masked = masked.clone()
        if not self.deviations:
            logits[:, self.mask] = -torch.inf
        chosen, drawn = self.choose(part, logits, masked)
        if bool((drawn[chosen] == self.mask).any()):
            self.result.rules.add(MASK_DRAWN)
        self.ids[0, part] = torch.where(chosen, drawn, self.ids[0, part])
        self.open[part] = (self.ids[0, part] == self.mask) if self.deviations else masked & ~chosen

    def choose(self, part: slice, logits: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """bool `[b]`, slots that are written, and long `[b]`, with what."""
        settings = self.settings
        if settings["decoder"] != "credit":
            return self.sure(logits, masked)
        blank_credit = torch.zeros(logits.shape)
        answers = []
        for credit in self.credit.setdefault(part.start, (blank_credit, blank_credit.double())):
            credit *= settings["decay_beta"]
            top = logits.to(credit.dtype).softmax(-1).max(-1)
            credit[torch.arange(len(credit)), top.indices] += top.values ** settings["boost_gamma"] * masked
            answers.append(self.sure(logits + settings["credit_alpha"] * (credit + 1).log(), masked))
        if self.deviations and not all(map(torch.equal, *answers)):
            self.result.rules.add(FLOAT32_CREDIT)
        return answers[0 if self.deviations else 1]

    def sure(self, logits: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        settings, drawn = self.settings, logits.argmax(-1)
        probability = logits.double().softmax(-1).gather(-1, drawn[:, None])[:, 0]
        scores = probability.masked_fill(~masked, -torch.inf)
        rules, one = self.result.rules, torch.ones(1).long()
        first = best(scores[None], masked[None], one, deviations=self.deviations, rules=rules)[0]
        if settings["decoder"] != "hierarchy":
            chosen = (scores >= settings["threshold"]) & masked
            chosen = chosen if bool(chosen.any()) else first
            if self.deviations:
                near = (scores >= min(float(scores.max()) - 1e-5, settings["threshold"])) & masked
                rules |= {NEAR_BEST} if not torch.equal(near, chosen) else set()
                return near, drawn
            return chosen, drawn
        chosen, slot = masked & (scores > settings["threshold"]), 0
        while slot < len(masked):
            end = slot
            while end < len(masked) and bool(masked[end]):
                end += 1
            if end > slot and float(scores[slot:end].max()) > settings["low_threshold"]:
                chosen[slot + int(scores[slot:end].argmax())] = True
            slot = max(end, slot + 1)
        return chosen | first, drawn

    def window(self, part: slice) -> tuple[int, int]:
        """The columns that a cached step feeds."""
        settings = self.settings
        if _has_vicinity(settings):
            return max(0, part.start - settings["prefix_look"]), min(len(self.at), part.stop + settings["after_look"])
        return part.start, len(self.at) if settings["cache_type"] == "prefix" else part.stop


class _Theirs(_Decoder):
    deviations = True
    iterations, stored, last = 0, False, None

    def block(self, part: slice) -> None:
        settings, vicinity, everything = self.settings, _has_vicinity(self.settings), len(self.at)
        self.open = self.ids[0] == self.mask
        while bool(self.open[part].any()):
            due = int(self.open[part].sum()) // settings["expected_tpf"]
            for turn in range(max(1, min(due, settings["maximum_unroll"]))):
                if turn and not bool(self.open[part].any()):
                    self.result.rules.add(IDLE_STEPS)
                if not vicinity and settings["cache_type"] is None:
                    self.step(part, 0, everything, keep=False)
                    continue
                if vicinity and self.iterations < settings["warmup_steps"]:
                    self.step(part, 0, everything, keep=False)
                    self.iterations += 1
                    continue
                if self._refreshes(part, vicinity):
                    self.step(part, 0, everything, keep=True)
                    self.stored, self.iterations = True, self.iterations + vicinity
                    if not bool(self.open[part].any()):
                        self.result.rules.add(FULL_BLOCK)
                self.step(part, *self.window(part), keep=False)
                self.iterations += 1

    def _refreshes(self, part: slice, vicinity: bool) -> bool:
        frequency = self.settings.get("cache_update_freq")
        if not self.stored:
            self.last = self.last if vicinity else part.start
            return True
        due = self.last != part.start or bool(frequency and self.iterations % frequency == 0)
        self.last = part.start
        return due and not (vicinity and part.start == self.width)


class _Ours(_Decoder):
    deviations = False
    steps = 0

    def block(self, part: slice) -> None:
        settings, step = self.settings, 0
        cached = _has_vicinity(settings) or settings["cache_type"] is not None
        warm = settings.get("warmup_steps") or 0
        while bool(self.open[part].any()):
            full = not cached or self.steps < warm or step % (settings.get("cache_update_freq") or 10**9) == 0
            low, high = (0, len(self.at)) if full else self.window(part)
            self.step(part, low, high, keep=True)
            self.steps, step = self.steps + 1, step + 1


def _has_vicinity(settings: dict[str, Any]) -> bool:
    return "prefix_look" in settings


def made_up(seed: int) -> Recorded:
    """Any decoder, with any of the caches in turns."""
    rng, generator = random.Random(f"dinfer {seed}"), torch.Generator().manual_seed(seed)
    blocks, block_length, width = rng.randint(1, 3), rng.choice([1, 4, 5, 8]), rng.randint(1, 12)
    cache = (None, "prefix", "dual", "vicinity")[seed % 4]
    settings: dict[str, Any] = {
        "decoder": rng.choice(["threshold", "hierarchy", "credit"]),
        "threshold": rng.choice([0.0, 0.3, 0.6, 0.9, 1.5]),
        "low_threshold": rng.choice([0.0, 0.3, 0.5]),
        "credit_alpha": 0.7,
        "boost_gamma": 0.2,
        "decay_beta": 0.8,
        "gen_length": blocks * block_length,
        "block_length": block_length,
        "maximum_unroll": rng.randint(1, 4),
        "expected_tpf": rng.choice([1, 4]),
        "early_stop": rng.random() < 0.5,
        "cache_type": None if cache == "vicinity" else cache,
        "cache_update_freq": rng.choice([None, 2, 3]),
    }
    if cache == "vicinity":
        settings |= {"prefix_look": rng.randint(0, 12), "after_look": rng.randint(0, 12)}
        settings["warmup_steps"] = rng.randint(0, 4)
    prompts = torch.randint(0, 62, (1, width), generator=generator)
    case = Case(folder(), "dinfer_made_up", {}, settings, {}, {}, {})
    recorded = Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
    return dataclasses.replace(recorded, ids=blank(recorded))
