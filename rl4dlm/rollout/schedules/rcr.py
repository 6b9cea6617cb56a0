"""Running confidence remasking (RCR) of MDPO (He et al., arXiv 2508.13148), and the sampler it improves on.

A step predicts every masked slot up to the end of the active block, writes them all and remembers how confident each
prediction was. Then the least confident of all written slots are masked again, as many as the count schedule leaves
open after the step: also tokens that were kept at earlier steps, and in earlier blocks, with the confidence they had
when they were last predicted. So as many tokens stay as without remasking, but which is decided anew at every step.
With `remask=False` the best are committed and stay, which is what MDPO compares with.

How many slots stay open after step j of S, of n that were masked when the block was entered, is floor(n g(r)) with
r = (j + 1) / S and g one of: `linear` 1 - r, `cosine` cos(pi r / 2), `pow` 1 - r^exponent, `log` -log2(r) / log2(n),
`exp` 1 - n^-(1 - r), within [0, 1] and 0 at the last step. `pow`, `exp` and `log` may have steps that change no count;
they cost their forward all the same, because with remasking they decide again. A block ends once nothing is to stay
open, which with more steps than slots is before the last one.

Confidences are those of the distribution drawn from, tempered and filtered. Differences from the released code: whether
a slot was ever predicted is known rather than read off a confidence of 0; products that are whole numbers are not
rounded down because of floating point; the mask token is no candidate; `update` may also keep the largest or smallest
confidence a slot ever had, as the paper's text can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Reading
from rl4dlm.rollout.schedules.checks import check_flag
from rl4dlm.rollout.schedules.dream import candidate_probability, certainty, margin, negative_entropy
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, top
from rl4dlm.rollout.schedules.registry import register

RUNNING = "rcr_running_confidence"


CONFIDENCES: dict[str, Reading] = {
    "probability": candidate_probability,
    "topk_margin": margin,
    "entropy": negative_entropy,
}
"""What a prediction's confidence is."""

UPDATES: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "last": (0.0, lambda old, new: new),
    "max": (-math.inf, torch.maximum),
    "min": (math.inf, torch.minimum),
}
"""How the running confidence takes in another prediction: what it starts with, and the rule."""

COUNTS = ("linear", "cosine", "pow", "log", "exp")


@dataclass(frozen=True)
class RCRArguments:
    """Settings of `rcr`.

    Args:
        confidence: `"probability"` of the candidate, `"topk_margin"` between the two most probable tokens, or
            `"entropy"` (negative).
        counts: how many slots stay open after each step: `"linear"`, `"cosine"`, `"pow"`, `"log"` or `"exp"`.
        exponent: of `"pow"`, above 0.
        update: which of the confidences a slot has had counts: `"last"`, `"max"` or `"min"`.
        remask: whether tokens are taken back; without, the schedule only differs from `low_confidence` in its counts
            and confidence.
    """

    confidence: str = "probability"
    counts: str = "linear"
    exponent: float = 2.0
    update: str = "last"
    remask: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("confidence", CONFIDENCES), ("counts", COUNTS), ("update", UPDATES)):
            if getattr(self, name) not in tuple(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; choose one of {', '.join(allowed)}")
        if not isinstance(self.exponent, int | float) or not 0 < self.exponent < math.inf:
            raise ValueError(f"exponent={self.exponent!r} is not allowed; it must be a number above 0")
        check_flag(self, "remask")


@register("rcr", RCRArguments, fixed_forwards=True)
def rcr(arguments: RCRArguments, config: Any) -> Schedule:
    """Writes everything at every step and keeps the most confident."""
    steps = config.steps_per_block
    initial, update = UPDATES[arguments.update]

    def open_after(step: Step) -> Tensor:
        return still_masked(step.masked_at_start, steps, step.step, arguments.counts, arguments.exponent)

    def best(step: Step, scores: Tensor) -> Tensor:
        return top(scores, step.eligible, step.eligible.sum(-1) - open_after(step))

    def everything(step: Step, scores: Tensor) -> Tensor:
        running = step.memory.slots.get(RUNNING, torch.full_like(scores, initial))
        step.memory.slots[RUNNING] = torch.where(step.eligible, update(running, scores), running)
        return step.eligible

    def least_confident(step: Step, commit: Tensor) -> Tensor:
        filled = (step.written | commit) & ~step.locked
        kept = top(step.memory.slots[RUNNING], filled, filled.sum(-1) - open_after(step))
        return filled & ~kept

    return Schedule(
        fixed_blocks(config),
        certainty,
        everything if arguments.remask else best,
        remask=least_confident if arguments.remask else None,
        reads={"certainty": CONFIDENCES[arguments.confidence]},
        patience=steps,
        reopens=arguments.remask,
    )


def still_masked(masked: Tensor, steps: int, step: Tensor, counts: str, exponent: float = 2.0) -> Tensor:
    """How many slots a count schedule leaves open after a step.

    Args:
        masked: long `[R]`, n of each row. steps: S. step: long `[R]`, j, from 0.
        counts: one of `COUNTS`. exponent: of `"pow"`.

    Returns:
        long `[R]`, floor(n g((j + 1) / S)); 0 from the last step on.
    """
    done = (step + 1).double() / steps
    bits = masked.clamp(min=2).double().log2()
    if counts == "linear":
        share = 1 - done
    elif counts == "cosine":
        share = torch.cos(done * math.pi / 2)
    elif counts == "pow":
        share = 1 - done**exponent
    elif counts == "log":
        share = -done.log2() / bits
    else:
        share = 1 - torch.exp2(-bits * (1 - done))
    left = (masked * share.clamp(0, 1) + 1e-9).floor().long()
    return torch.where(step + 1 >= steps, 0, left)
