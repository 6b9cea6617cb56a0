"""Confidence-aware parallel decoding (Fast-dLLM, arXiv 2505.22618): everything confident enough is written at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, above, probability
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
    return Schedule(fixed_blocks(config), probability, above(arguments.threshold))
