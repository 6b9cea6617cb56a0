"""Wide-in, narrow-out (WINO, Hong et al., arXiv 2507.18578): draft generously, take back what does not hold up.

Each step drafts all candidates of the block above `threshold`, within a cap, and verifies what the block held before:
a copy of the block made of mask tokens is fed along, each of which sees everything but the slot it stands for. Tokens
whose probability there is below `verify_threshold` are masked again, the least probable first, fewer than were drafted
at the step before; none at a step that drafts one token only. So every block comes to an end: what is taken back at a
step is bounded by what was gained at the one before.

Differences from the released code: rows are decoded in batches, the copies of a block do not see one another (there
they do), tokens that were given are never taken back, and the mask token is no candidate. The cap is as there: 70 % of
the masked slots, but 5 at least and 20 at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability, top
from rl4dlm.rollout.schedules.registry import register

DRAFTED = "wino_drafted"


@dataclass(frozen=True)
class WINOArguments:
    """Settings of `wino`.

    Args:
        threshold: candidates whose probability exceeds it are drafted.
        verify_threshold: written tokens of the block whose probability without themselves is below it are masked
            again; 0: none is.
        fraction: of the masked slots that are drafted at most, 0 to 1.
        min_cap: but so many may always be. max_cap: never more.
    """

    threshold: float = 0.6
    verify_threshold: float = 0.9
    fraction: float = 0.7
    min_cap: int = 5
    max_cap: int = 20

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)
        check_number(self, "verify_threshold", 0)
        check_number(self, "fraction", 0, 1)
        check_count(self, "min_cap", 1)
        check_count(self, "max_cap", 1)
        if self.min_cap > self.max_cap:
            raise ValueError(
                f"min_cap={self.min_cap} is not allowed; it must not be larger than max_cap={self.max_cap}"
            )


@register("wino", WINOArguments, takes_steps=False)
def wino(arguments: WINOArguments, config: Any) -> Schedule:
    """Drafts above a threshold and masks again what the model would not write there."""

    def draft(step: Step, scores: Tensor) -> Tensor:
        share = (step.eligible.sum(-1).double() * arguments.fraction + 1e-9).long()  # 0.7 of 10 is 7 in any arithmetic
        cap = share.clamp(arguments.min_cap, arguments.max_cap)
        sure = ((scores > arguments.threshold) & step.eligible).sum(-1)
        return top(scores, step.eligible, torch.minimum(sure, cap).clamp(min=1))

    def verify(step: Step, commit: Tensor) -> Tensor:
        drafted = commit.sum(-1)
        before = step.memory.rows.get(DRAFTED, drafted)  # in a block's first step there is nothing to verify
        step.memory.rows[DRAFTED] = drafted
        shadow = step.read["shadow"]
        doubtful = step.inside & step.written & ~step.locked & (shadow.exp() < arguments.verify_threshold)
        return top(-shadow, doubtful, torch.where(drafted > 1, before - 1, 0))

    # A row that gains nothing drafts fewer than at the step before, so that this lasts less than max_cap steps.
    return Schedule(fixed_blocks(config), probability, draft, remask=verify, shadow=True, patience=arguments.max_cap)
