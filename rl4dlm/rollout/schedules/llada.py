"""LLaDA's sampler (Nie et al., arXiv 2502.09992): an even number of tokens per step, best first or in random order.

In each block the masked positions are shared out evenly over the block's steps. `low_confidence` commits the candidates
of highest untempered probability; `random` an order drawn per row. Differences from the released sampler: the mask
token is no candidate, masked means "a slot not yet written" rather than "holds the mask id", noise is keyed per
position, steps at which nothing is left to write cost no forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rl4dlm.rollout.schedules.parts import FixedBlocks, Schedule, even_top, probability, random_order
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class LLaDAArguments:
    """LLaDA's schedules have no settings beyond those every schedule shares."""


@register("low_confidence", LLaDAArguments)
def low_confidence(arguments: LLaDAArguments, config: Any) -> Schedule:
    """Commits the most confident candidates; the others stay masked."""
    return Schedule(fixed_blocks(config), probability, even_top(config.steps_per_block))


@register("random", LLaDAArguments)
def random(arguments: LLaDAArguments, config: Any) -> Schedule:
    """Commits positions in random order, whatever their confidence."""
    return Schedule(fixed_blocks(config), random_order, even_top(config.steps_per_block))


def fixed_blocks(config: Any) -> FixedBlocks:
    """The blocks that a `DecodingConfig` asks for."""
    return FixedBlocks(config.block_length or config.canvas_length, config.canvas_length)
