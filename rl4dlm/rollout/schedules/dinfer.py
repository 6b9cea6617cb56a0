"""Decoders of dInfer (Ma et al., arXiv 2510.08666): three ways to write more tokens per forward than a threshold does.

`hierarchical` divides and conquers: besides all sure candidates it writes the best one of each run of open slots, as
tokens that are far apart depend less on each other. It can also take tokens of the block back: those that the model now
finds improbable are opened again, and more are written than were opened.

`credit` adds to the logits of tokens that have been the most probable ones of their slot before (CreditDecoding, Wang
et al., arXiv 2510.06133), then writes by a threshold. Per slot and token, credit grows by `p ** power` whenever the
token is the most probable one and shrinks by a factor per step; `weight * log(1 + credit)` is added.

`smoothing` feeds open slots the mask's embedding plus a part of the mean embedding under the last prediction there, and
lowers the threshold from step to step. What is recorded as log-probabilities holds for these inputs only.

Differences from the released code: any number of rows, each with its own state, which no other request sees; the mask
token is no candidate and earns no credit; equal candidates are written one at a time, and so is the best one where none
reaches the threshold (there, all within 1e-5 of it). Tokens are taken back by the probability of the token itself, not
that of the most probable one. The masked slots of later blocks are soft inputs too, always, since nothing is cached.
Iterations are not unrolled, and blocks start where the response does or on the grid of the model's attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Places, Scored, lowest_argmax
from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CanvasInput, Schedule, Step, above, probability, top
from rl4dlm.rollout.schedules.registry import register
from rl4dlm.rollout.soft_inputs import mixed_embeddings

CHOSEN, CREDIT_TOKENS, CREDIT_VALUES, MIXTURE = "chosen", "credit_tokens", "credit_values", "mixture"


# --- hierarchical -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HierarchicalArguments:
    """Settings of `hierarchical`.

    Args:
        threshold: every candidate of larger probability is committed; `inf` for none.
        low_threshold: the best candidate of a run of open slots is committed if its probability is larger; `inf` for
            none.
        remask_threshold: written tokens of the block whose probability is smaller are opened again; 0 for none.
    """

    threshold: float = 0.92
    low_threshold: float = 0.4
    remask_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)
        check_number(self, "low_threshold", 0)
        check_number(self, "remask_threshold", 0, 1)


@register("hierarchical", HierarchicalArguments, takes_steps=False)
def hierarchical(arguments: HierarchicalArguments, config: Any) -> Schedule:
    """Commits sure candidates, and the best one of each run of open slots if it is sure enough."""
    high, low, doubt = arguments.threshold, arguments.low_threshold, arguments.remask_threshold

    def spread(scores: Tensor, open_slots: Tensor) -> Tensor:
        return open_slots & ((scores > high) | (best_of_runs(scores, open_slots) & (scores > low)))

    if doubt == 0:
        return Schedule(fixed_blocks(config), probability, lambda step, scores: spread(scores, step.eligible))

    def doubted(step: Step) -> Tensor:
        return step.inside & step.written & ~step.locked & (step.read["held"] < math.log(doubt))

    def commit(step: Step, scores: Tensor) -> Tensor:
        reopened = doubted(step)
        open_slots = step.eligible | reopened
        chosen = spread(scores, open_slots)
        missing = reopened.sum(-1) + 1 - chosen.sum(-1)  # one more than are opened again, so that every step gains one
        chosen |= top(scores, open_slots & ~chosen, missing)
        step.memory.slots[CHOSEN] = chosen
        return chosen

    return Schedule(
        fixed_blocks(config),
        probability,
        commit,
        replace=lambda step, _: doubted(step) & step.memory.slots[CHOSEN] & (step.drawn.token != step.tokens),
        remask=lambda step, _: doubted(step) & ~step.memory.slots[CHOSEN],
        scope="block",
        reads={"held": lambda scored: scored.held_log_prob},
    )


def best_of_runs(scores: Tensor, open_slots: Tensor) -> Tensor:
    """The best slot of each run of neighbouring open ones, the lowest among equals: bool `[R, W]`.

    Args:
        scores: `[R, W]`. open_slots: bool `[R, W]`.
    """
    width = scores.shape[1]
    before = torch.nn.functional.pad(open_slots, (1, 0))[:, :width]
    run = torch.where(open_slots, (open_slots & ~before).cumsum(-1), 0)  # [R, W], numbers from 1; 0 outside of runs
    scores = scores.masked_fill(~open_slots, -torch.inf)
    best = scores.new_full((len(scores), width + 1), -torch.inf).scatter_reduce(-1, run, scores, "amax")
    equal = open_slots & (scores == best.gather(-1, run))
    offsets = torch.arange(width, device=scores.device).expand_as(run)
    lowest = run.new_full((len(run), width + 1), width)
    lowest = lowest.scatter_reduce(-1, run, torch.where(equal, offsets, width), "amin")
    return equal & (offsets == lowest.gather(-1, run))


# --- credit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CreditArguments:
    """Settings of `credit`.

    Args:
        threshold: a candidate is committed when its probability, credit included, reaches it.
        weight: α, of the credit; 0 turns it off.
        power: γ, of the probability that is credited.
        decay: β, what is left of credit after a step.
    """

    threshold: float = 0.9
    weight: float = 0.7
    power: float = 0.2
    decay: float = 0.8

    def __post_init__(self) -> None:
        for name in ("threshold", "weight", "power"):
            check_number(self, name, 0)
        if math.inf in (self.weight, self.power):
            raise ValueError(f"weight={self.weight!r}, power={self.power!r} is not allowed; both must be finite")
        check_number(self, "decay", 0, 1)


@register("credit", CreditArguments, takes_steps=False)
def credit(arguments: CreditArguments, config: Any) -> Schedule:
    """Commits every candidate whose probability, with credit for having been the best before, reaches the threshold."""

    def earned(logits: Tensor, places: Places) -> Tensor:
        """Credit `[n, V]`, that of this step included."""
        total = torch.zeros_like(logits)
        slots = places.memory.slots
        if CREDIT_VALUES in slots:
            tokens, values = (slots[name][places.rows, places.positions] for name in (CREDIT_TOKENS, CREDIT_VALUES))
            total.scatter_add_(-1, tokens, arguments.decay * values)
        token, gain = _gain(logits, places, arguments.power)
        return total.scatter_add_(-1, token[:, None], gain[:, None])

    def read(scored: Scored) -> Tensor:
        """float64 `[n, 2]`: the token that earns credit, and how much."""
        assert scored.model_logits is not None
        token, gain = _gain(scored.model_logits, scored.places, arguments.power)
        return torch.stack([token.double(), gain.double()], -1)

    def confidence(step: Step) -> Tensor:
        token, gain = step.read["gain"].unbind(-1)
        _remember(step, token.long(), gain.to(step.drawn.confidence.dtype), arguments.decay)
        return step.drawn.confidence

    return Schedule(
        fixed_blocks(config),
        confidence,
        above(arguments.threshold),
        reads={"gain": read},
        transform=lambda logits, places: logits + arguments.weight * earned(logits, places).log1p(),
    )


def _gain(logits: Tensor, places: Places, power: float) -> tuple[Tensor, Tensor]:
    """The most probable token of each slot besides the mask token, long `[n]`, and its probability to a power, `[n]`.

    Only open slots are looked at, so what they hold is the mask token.
    """
    token = lowest_argmax(logits.scatter(-1, places.held[:, None], -torch.inf))
    log_prob = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
    return token, (power * log_prob).exp()


def _remember(step: Step, token: Tensor, gain: Tensor, decay: float) -> None:
    """Adds this step's credit, long and float `[R, W]`, to what is remembered of each slot.

    Credit is a decayed sum of one token per step, so tokens and values `[R, W, S]` say all, S the steps made in the
    block. Each token has credit in one column of a slot; the others hold 0. Slots of a block that is entered have none.
    """
    slots = step.memory.slots
    empty = gain.new_zeros(*gain.shape, 0)
    tokens, values = slots.get(CREDIT_TOKENS, empty.long()), slots.get(CREDIT_VALUES, empty)
    more = max(0, int(step.step.max()) + 1 - tokens.shape[-1])
    tokens, values = (torch.nn.functional.pad(tensor, (0, more)) for tensor in (tokens, values))
    values = values * decay
    token, gain = token[..., None], gain[..., None]
    known = (tokens == token) & (values > 0)
    column = step.step[:, None, None].expand_as(token)
    fresh = torch.where(known.any(-1, keepdim=True), 0.0, gain)
    slots[CREDIT_TOKENS] = tokens.scatter(-1, column, token)
    slots[CREDIT_VALUES] = torch.where(known, values + gain, values).scatter(-1, column, fresh)


# --- smoothing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmoothingArguments:
    """Settings of `smoothing`. Steps t count from the start of the row, from 0.

    Args:
        threshold: what the threshold falls to.
        start_threshold: the threshold of step t is `start_threshold - threshold_decay * t`, at least `threshold`; no
            larger than `threshold` means that it never changes.
        threshold_decay: see there.
        weight: the mean embedding under the prediction of step t counts `weight + weight_growth * t`, at most
            `max_weight`.
        weight_growth, max_weight: see there.
        mixture_temperature: of these predictions.
    """

    threshold: float = 0.8
    start_threshold: float = 1.0
    threshold_decay: float = 0.02
    weight: float = 0.15
    weight_growth: float = 0.02
    max_weight: float = 0.3
    mixture_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("threshold", "start_threshold", "threshold_decay", "weight", "weight_growth", "max_weight"):
            check_number(self, name, 0)
        for name in ("start_threshold", "threshold_decay", "weight", "weight_growth", "max_weight"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name}=inf is not allowed; it must be finite")
        check_number(self, "mixture_temperature", 0)
        if self.mixture_temperature in (0, math.inf):
            raise ValueError(
                f"mixture_temperature={self.mixture_temperature!r} is not allowed; it must be larger than 0, and finite"
            )


@register("smoothing", SmoothingArguments, takes_steps=False)
def smoothing(arguments: SmoothingArguments, config: Any) -> Schedule:
    """Commits by a falling threshold; open slots are fed what the model last predicted there, besides the mask."""

    def read(scored: Scored) -> Tensor:
        assert scored.places.embedding is not None
        probabilities = (scored.logits / arguments.mixture_temperature).softmax(-1)
        return mixed_embeddings(probabilities, scored.places.embedding())

    def commit(step: Step, scores: Tensor) -> Tensor:
        step.memory.slots[MIXTURE] = step.read[MIXTURE]
        fallen = arguments.start_threshold - arguments.threshold_decay * step.total_step.to(scores.dtype)
        return scores >= fallen.clamp(min=arguments.threshold)[:, None]

    def inputs(canvas: CanvasInput) -> Tensor:
        if MIXTURE not in canvas.memory.slots:  # nothing is predicted yet
            return canvas.embeddings
        last = (canvas.total_step - 1).to(canvas.embeddings.dtype)
        weight = (arguments.weight + arguments.weight_growth * last).clamp(max=arguments.max_weight)
        soft = canvas.embeddings + weight[:, None, None] * canvas.memory.slots[MIXTURE]
        return torch.where(canvas.masked[..., None], soft, canvas.embeddings)

    return Schedule(fixed_blocks(config), probability, commit, scope="masked", reads={MIXTURE: read}, inputs=inputs)
