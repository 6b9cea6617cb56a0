"""Entropy-bounded unmasking (Ben-Hamu et al., arXiv 2505.24857): as many tokens at once as depend little on each other.

Positions are sorted by the entropy of their distribution, lowest first, and written while the entropies before each one
add up to at most `gamma`. That sum, of all that are written together but the largest, bounds their mutual information
and so what is lost by drawing them independently.

Differences from the released samplers: the rule runs in every block of the canvas (one by default) and for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.entropy_bound_canvas import within_entropy_bound
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CommitRule, Schedule, Step
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class EntropyBoundArguments:
    """Settings of `entropy_bound`.

    Args:
        gamma: the bound in nats. At 0 one token is written per step, and with it those of entropy 0; `inf` writes a
            block at once.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "gamma", 0)


@register("entropy_bound", EntropyBoundArguments, takes_steps=False)
def entropy_bound(arguments: EntropyBoundArguments, config: Any) -> Schedule:
    """Commits the candidates of lowest entropy, as many as the bound allows."""
    return Schedule(fixed_blocks(config), lowest_entropy, bounded(arguments.gamma), memoryless=True, reads_entropy=True)


def lowest_entropy(step: Step) -> Tensor:
    """Scores `[R, W]`: minus the untempered entropy, in nats."""
    return -step.drawn.entropy


def bounded(gamma: float) -> CommitRule:
    """Commits while minus the scores before add up to at most `gamma`."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(~step.eligible, -float("inf"))
        return within_entropy_bound(-scores, gamma) & scores.isfinite()

    return rule
