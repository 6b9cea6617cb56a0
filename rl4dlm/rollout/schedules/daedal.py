"""DAEDAL: the model decides how long its answer becomes (Li et al., arXiv 2508.00819).

A row starts with a short canvas. First its length is searched: as long as the model is not sure enough that the text
ends inside the canvas, masked slots are appended; then a few end-of-sequence tokens close it. After that a window moves
over the canvas. Each step writes every candidate of the window that is sure enough, at least the best one, and may put
masked slots in at the least sure of those that stay open, if the model sees no end there. When nothing in the window is
open, the next one follows. What is pushed over the largest length is cut off.

How sure the model is of the end: the probabilities of the end-of-sequence token at the last few slots where it is the
most probable one, summed, over the number of slots looked for; slots that are missing count 0.

Differences from the released code: rows do not wait for each other, so none can end the others' decoding; guidance also
steers the search for the length; the mask token is no candidate; any end-of-sequence token of the model counts, the
first one is written; rows may stop early at an end-of-sequence token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Scored, lowest_argmax
from rl4dlm.rollout.schedules.adablock import refuse_block_length
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.parts import FixedBlocks, Resize, Schedule, Step, probability, top
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class DaedalArguments:
    """Settings of `daedal`; `DecodingConfig.canvas_length` is the largest length, and nothing closes the canvas before
    `min_new_tokens` slots.

    Args:
        start_length: slots that a row starts with; a shorter canvas is the start itself.
        window: slots that are decoded at a time.
        high: a candidate is written when its probability exceeds it.
        low: an open slot is a place for more slots when its candidate's probability is below.
        growth: slots that are appended at a time, and that take the place of one slot.
        length_end: certainty of the end at which the search for the length stops.
        insert_end: certainty of the end from which on nothing is put in.
        end_slots: slots that the certainty is taken over; half as many end-of-sequence tokens close the canvas.
    """

    start_length: int = 64
    window: int = 32
    high: float = 0.9
    low: float = 0.1
    growth: int = 8
    length_end: float = 0.5
    insert_end: float = 0.9
    end_slots: int = 32

    def __post_init__(self) -> None:
        for name in ("start_length", "window", "growth", "end_slots"):
            check_count(self, name, 1)
        for name in ("high", "low", "length_end", "insert_end"):
            check_number(self, name, 0)


@register("daedal", DaedalArguments, takes_steps=False)
def daedal(arguments: DaedalArguments, config: Any) -> Schedule:
    """Searches a length, then fills it from left to right, making room where the model is unsure."""
    refuse_block_length(config, "window")
    rules = _Rules(arguments, config.min_new_tokens, config.canvas_length)
    start = min(arguments.start_length, config.canvas_length)
    return Schedule(
        FixedBlocks(arguments.window, on_grid=False),
        probability,
        rules.commit,
        resize=rules.resize,
        scope="canvas",
        reads={"likeliest": likeliest, "likelihood": likelihood},
        patience=1 - (start - config.canvas_length) // arguments.growth,  # the longest search, and its last look
        start_length=start,
    )


@dataclass(frozen=True)
class _Rules:
    """What is written, and how the length changes, from `shortest` to `largest` slots.

    A row remembers whether its length is `found`, and of the current step the `certainty` of the end and the `gap`, the
    slot that makes room (-1: none).
    """

    arguments: DaedalArguments
    shortest: int
    largest: int

    def commit(self, step: Step, scores: Tensor) -> Tensor:
        found = step.memory.rows.setdefault("found", torch.zeros_like(step.length, dtype=torch.bool))
        certainty = end_certainty(step, self.arguments.end_slots)
        sure = step.eligible & (scores > self.arguments.high)
        fill = sure | top(scores, step.eligible, 1 - sure.any(-1).long())
        fill &= found[:, None]
        unsure = step.eligible & ~fill & (step.drawn.confidence < self.arguments.low)
        unsure &= (found & (certainty < self.arguments.insert_end) & (step.length < self.largest))[:, None]
        least = top(-step.drawn.confidence, unsure, torch.ones_like(step.length))
        gap = torch.where(unsure.any(-1), least.long().argmax(-1), -1)
        step.memory.rows["certainty"], step.memory.rows["gap"] = certainty, gap
        return fill

    def resize(self, step: Step) -> Resize:
        rows = step.memory.rows
        found, gap, room = rows["found"], rows["gap"], self.largest - step.length
        short = (rows["certainty"] < self.arguments.length_end) | (step.length < self.shortest)
        longer = ~found & short & (room > 0)
        rows["found"] = ~longer
        appended = torch.where(longer, self.arguments.growth, self.arguments.end_slots // 2).minimum(room)
        inserted = torch.where(gap >= 0, self.arguments.growth - 1, 0)
        return Resize(
            at=torch.where(found, gap.clamp(min=0), step.length),
            count=torch.where(found, inserted, appended),
            token=torch.where(found | longer, step.mask_token_id, step.eos_token_ids[0]),
            limit=torch.full_like(step.length, self.largest),
        )


def end_certainty(step: Step, slots: int) -> Tensor:
    """How sure the model is that the text ends inside the canvas, `[R]` in [0, 1]."""
    ends = step.seen & step.is_eos(step.read["likeliest"])
    last = ends & (ends.long().flip(-1).cumsum(-1).flip(-1) <= slots)
    return torch.where(last, step.read["likelihood"], 0.0).sum(-1) / slots


def likeliest(scored: Scored) -> Tensor:
    """The most probable tokens, whatever is drawn: long `[n]`."""
    return lowest_argmax(scored.logits)


def likelihood(scored: Scored) -> Tensor:
    """Their untempered probabilities `[n]`."""
    return scored.log_probs.amax(-1).exp()
