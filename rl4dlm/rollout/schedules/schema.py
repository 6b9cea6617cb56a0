"""S³'s sampler (self-adaptive schema scaffolding, arXiv 2507.04504): templates whose slots are filled best first.

The canvas starts as a template, written by `RolloutEngine.generate`'s `hints`, and is seen whole from the first step.
Each step commits the same number of the most probable tokens, wherever they are: the open slots divided by the steps,
rounded up; the last step commits all that is left. `rl4dlm.rollout.constraints.schema` makes templates from JSON
schemas.

Differences from the released code: any number of rows, each with its own template; confidences are the untempered
probabilities rather than those of noised logits; slots are known by position, not by holding the mask token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count
from rl4dlm.rollout.schedules.parts import FixedBlocks, Schedule, Step, probability, top
from rl4dlm.rollout.schedules.registry import register

STEPS = 16
"""Steps where none are given, as in the released code."""


@dataclass(frozen=True)
class SchemaArguments:
    """Settings of `schema`.

    Args:
        tokens_per_step: how many tokens each step commits; None: the open slots divided by the steps, rounded up.
    """

    tokens_per_step: int | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_step is not None:
            check_count(self, "tokens_per_step", 1)


@register("schema", SchemaArguments, fixed_forwards=True)
def schema(arguments: SchemaArguments, config: Any) -> Schedule:
    """Commits the most confident candidates of the whole template, the same number at each step.

    Raises:
        ValueError: the canvas is to be written in several blocks.
    """
    if config.num_blocks > 1:
        raise ValueError(
            f"block_length={config.block_length} is not allowed for schedule='schema', which fills a template as a "
            "whole; leave it None"
        )
    steps = config.steps or STEPS

    def commit(step: Step, scores: Tensor) -> Tensor:
        share = -(-step.masked_at_start // steps)
        counts = share if arguments.tokens_per_step is None else torch.full_like(share, arguments.tokens_per_step)
        counts = torch.where(step.step < steps - 1, counts, step.masked_at_start)
        return top(scores, step.eligible, counts)

    return Schedule(FixedBlocks(config.canvas_length, on_grid=False), probability, commit)
