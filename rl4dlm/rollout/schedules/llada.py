"""LLaDA's sampler (Nie et al., arXiv 2502.09992): an even number of tokens per step, best first or in another order.

In each block the masked positions are shared out evenly over the block's steps. `low_confidence` commits the candidates
of highest untempered probability; `random` an order drawn per row; `left_to_right` the first ones, as a causal model
would with a few tokens at a time. Differences from the released sampler: the mask
token is no candidate, masked means "a slot not yet written" rather than "holds the mask id", noise is keyed per
position, steps at which nothing is left to write cost no forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.parts import (
    Ahead,
    FixedBlocks,
    Schedule,
    Step,
    even_top,
    foreseen,
    keyed_uniform,
    probability,
    random_order,
)
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class LLaDAArguments:
    """LLaDA's schedules have no settings beyond those every schedule shares."""


@register("low_confidence", LLaDAArguments, fixed_forwards=True)
def low_confidence(arguments: LLaDAArguments, config: Any) -> Schedule:
    """Commits the most confident candidates; the others stay masked."""
    return Schedule(fixed_blocks(config), probability, even_top(config.steps_per_block), memoryless=True)


@register("random", LLaDAArguments, fixed_forwards=True)
def random(arguments: LLaDAArguments, config: Any) -> Schedule:
    """Commits positions in random order, whatever their confidence."""
    steps = config.steps_per_block
    return Schedule(
        fixed_blocks(config), random_order, even_top(steps), upcoming=foreseen(_coming_order, steps), memoryless=True
    )


@register("left_to_right", LLaDAArguments, fixed_forwards=True)
def left_to_right(arguments: LLaDAArguments, config: Any) -> Schedule:
    """Commits positions in reading order, whatever their confidence."""
    steps = config.steps_per_block
    return Schedule(
        fixed_blocks(config), reading_order, even_top(steps), upcoming=foreseen(_left_first, steps), memoryless=True
    )


def reading_order(step: Step) -> Tensor:
    """Scores `[R, W]` that fall from left to right."""
    return -step.offsets.to(step.drawn.confidence).expand(step.tokens.shape)


def _coming_order(ahead: Ahead) -> Tensor:
    """The scores that `random_order` will give, `[R, W]`."""
    return keyed_uniform(ahead.noise, "order", ahead.row_ids, ahead.total_step, ahead.eligible)


def _left_first(ahead: Ahead) -> Tensor:
    return -torch.arange(ahead.eligible.shape[1], device=ahead.eligible.device).double().expand(ahead.eligible.shape)


def fixed_blocks(config: Any) -> FixedBlocks:
    """The blocks that a `DecodingConfig` asks for."""
    return FixedBlocks(config.block_length or config.canvas_length)
