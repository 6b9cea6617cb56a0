"""Confidence-aware parallel decoding (Fast-dLLM, arXiv 2505.22618): everything confident enough is written at once.

`threshold` commits what reaches a fixed probability. `factor` asks for more the more go together: with the candidates
sorted by probability c(1) >= c(2) >= ..., the n-th goes with those before it while `(n + 1) * (1 - c(n)) <= f`, the
condition under which writing n tokens together is what writing them one by one would give (theorem 1 with f = 1).

Differences from the released code: both take any number of rows; `factor` writes the ranks before the first that
fails, while there a walk that stops at the last rank writes that one too, so that two masked positions always go
together; noise and the mask token as in `llada`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CommitRule, Schedule, Step, above, probability, ranks
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class ThresholdArguments:
    """Settings of `threshold`.

    Args:
        threshold: a candidate is committed when its probability reaches it. At 1 several tokens may still go together,
            because a probability can round to 1; above 1 (or `inf`) it is strictly one token per step.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        value: Any = self.threshold
        if not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"threshold={value!r} is not allowed; it must be a number, 0 or larger")


@register("threshold", ThresholdArguments, takes_steps=False)
def threshold(arguments: ThresholdArguments, config: Any) -> Schedule:
    """Commits every candidate of the block whose probability reaches the threshold, and always the best one."""
    return Schedule(fixed_blocks(config), probability, above(arguments.threshold), memoryless=True)


@dataclass(frozen=True)
class FactorArguments:
    """Settings of `factor`.

    Args:
        factor: f. At 0 only candidates of probability 1 go together; with more than one for each slot of a block
            everything does.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "factor", 0)


@register("factor", FactorArguments, takes_steps=False)
def factor(arguments: FactorArguments, config: Any) -> Schedule:
    """Commits the most confident candidates of the block, as many as are confident enough for that number."""
    return Schedule(fixed_blocks(config), probability, confident_together(arguments.factor), memoryless=True)


def confident_together(factor: float) -> CommitRule:
    """Commits the ranks before the first whose score is below `1 - factor / (rank + 1)`, counted from 1; the first
    always."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        rank = ranks(scores, step.eligible)
        fails = (scores < 1 - factor / (rank + 2).to(scores)) & (rank > 0) & step.eligible
        first = torch.where(fails, rank, rank.shape[-1]).amin(-1, keepdim=True)
        return step.eligible & (rank < first)

    return rule
