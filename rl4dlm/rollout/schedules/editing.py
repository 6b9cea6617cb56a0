"""Block refinement with editing (LLaDA2.1): written tokens are replaced when the model has become sure of others.

A block is filled as `sdar_dynamic` does. At every step a token written earlier in the block is replaced where the
candidate drawn for its slot is a different one and its probability exceeds `editing_threshold`. When the block is full,
up to `max_post_steps` further steps do nothing but edit; the first of them without an edit ends the block. After Bie et
al., arXiv 2602.08676, and the block refinement of diffusers, which the constants are from.

Differences: rows stop editing on their own rather than when all rows of a batch have, padding never reaches the
attention of other rows, an editing threshold of 0 edits at any probability (there it may also switch editing off).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.dream import candidate_probability, certainty
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step
from rl4dlm.rollout.schedules.registry import register
from rl4dlm.rollout.schedules.sdar import even_or_above

EDITED, POST_STEPS = "editing_edited", "editing_post_steps"


@dataclass(frozen=True)
class EditingArguments:
    """Settings of `editing`.

    Args:
        threshold: candidates whose probability exceeds it fill open slots, if they are enough; 0.95 for quality, 0.7
            for speed.
        editing_threshold: candidates whose probability exceeds it replace written tokens; 1 or more: none does.
        max_post_steps: steps that a full block may be edited for; 0 for none.
    """

    threshold: float = 0.95
    editing_threshold: float = 0.5
    max_post_steps: int = 16

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)
        check_number(self, "editing_threshold", 0)
        check_count(self, "max_post_steps", 0)


@register("editing", EditingArguments)
def editing(arguments: EditingArguments, config: Any) -> Schedule:
    """Fills a block and corrects what was written in it."""

    def replace(step: Step, commit: Tensor) -> Tensor:
        editable = step.seen & step.written & ~step.locked
        other = step.drawn.token != step.tokens
        edits = editable & other & (certainty(step) > arguments.editing_threshold)
        filling = step.eligible.any(-1)
        made = step.memory.rows.get(POST_STEPS, torch.zeros_like(step.step))
        step.memory.rows[POST_STEPS] = torch.where(filling, 0, made + 1)
        step.memory.rows[EDITED] = edits.any(-1)
        return edits

    def stay(step: Step) -> Tensor:
        filling = step.eligible.any(-1)
        more = step.memory.rows[POST_STEPS] < arguments.max_post_steps
        return more & (filling | step.memory.rows[EDITED])

    return Schedule(
        fixed_blocks(config),
        certainty,
        even_or_above(config.steps_per_block, arguments.threshold),
        replace=replace,
        stay=stay,
        scope="block",
        patience=arguments.max_post_steps,
        reads={"certainty": candidate_probability},
    )
