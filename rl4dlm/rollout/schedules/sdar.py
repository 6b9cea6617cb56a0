"""SDAR's dynamic low-confidence decoding (arXiv 2510.06303): at least an even share per step, more where it is sure.

At each step of a block all candidates above the threshold are committed if they are at least as many as an even
schedule would write, else that many of the best. The confidence is the probability under the distribution that the
candidate is drawn from: tempered and filtered. Differences from the released code: rows that start inside a block share
out what is open there rather than the whole block, and at temperature 0, which it does not allow, the most probable
candidate is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.dream import candidate_probability, certainty
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CommitRule, Schedule, Step, even_counts, top
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class SDARArguments:
    """Settings of `sdar_dynamic`.

    Args:
        threshold: candidates whose probability exceeds it are committed if they are enough; above 1 the schedule is
            the even one.
    """

    threshold: float = 0.85

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)


@register("sdar_dynamic", SDARArguments)
def sdar_dynamic(arguments: SDARArguments, config: Any) -> Schedule:
    """Commits what is above the threshold, and never fewer than an even share."""
    return Schedule(
        fixed_blocks(config),
        certainty,
        even_or_above(config.steps_per_block, arguments.threshold),
        reads={"certainty": candidate_probability},
        memoryless=True,
    )


def even_or_above(steps: int, threshold: float) -> CommitRule:
    """Commits the best: as many as an even schedule of `steps` steps, or all above the threshold if these are more."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        sure = ((scores > threshold) & step.eligible).sum(-1)
        even = even_counts(step.masked_at_start, steps, step.step)
        return top(scores, step.eligible, torch.maximum(sure, even))

    return rule
