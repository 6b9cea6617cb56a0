"""Saber (Dong et al., arXiv 2510.18165): faster as it gets surer, and back where confidence falls.

Each step commits the candidates of the block whose probability exceeds the mean of those committed so far, and at least
`min_tokens` of the best. Then tokens written before are masked again: those whose own probability has fallen most since
the last step, max(`min_tokens` / 2, an eighth of what was committed) of them and fewer than were committed. A step that
fills the block takes nothing back.

Differences from the released code: the fall is that of the token held, not of whatever is most probable in its slot
(which can rise while the token becomes implausible); so tokens of this very step, for which there is no step before,
stay. Only the active block is taken back from. Where fewer than `min_tokens` slots are open, the rest is not taken from
other blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count, check_flag
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability, top
from rl4dlm.rollout.schedules.registry import register

HELD, COMMITTED_AT, BEFORE = "held", "saber_committed_at", "saber_before"


@dataclass(frozen=True)
class SaberArguments:
    """Settings of `saber`.

    Args:
        min_tokens: committed at every step, where so many slots are open; 1 or larger.
        backtrack: whether tokens are masked again.
    """

    min_tokens: int = 2
    backtrack: bool = True

    def __post_init__(self) -> None:
        check_count(self, "min_tokens", 1)
        check_flag(self, "backtrack")


@register("saber", SaberArguments, takes_steps=False)
def saber(arguments: SaberArguments, config: Any) -> Schedule:
    """Commits above the running mean, and takes back what has lost most."""

    def commit(step: Step, scores: Tensor) -> Tensor:
        slots, least = step.memory.slots, arguments.min_tokens
        known = slots.get(COMMITTED_AT, torch.full_like(step.drawn.confidence, -1.0))
        sure = ((scores > mean_of_known(known)[:, None]) & step.eligible).sum(-1)
        chosen = top(scores, step.eligible, sure.clamp(min=least))
        slots[COMMITTED_AT] = torch.where(chosen, step.drawn.confidence, known)
        return chosen

    def take_back(step: Step, committed: Tensor) -> Tensor:
        number = committed.sum(-1)
        now = torch.where(committed, step.drawn.confidence, step.read[HELD])
        fall = step.memory.slots.get(BEFORE, now) - now
        step.memory.slots[BEFORE] = now
        counts = torch.minimum(
            (number + 7).div(8, rounding_mode="floor").clamp(min=arguments.min_tokens // 2), number - 1
        )
        full = ~(step.eligible & ~committed).any(-1)
        earlier = step.inside & step.written & ~step.locked
        return top(fall, earlier, counts.masked_fill(full, 0))

    if not arguments.backtrack:
        return Schedule(fixed_blocks(config), probability, commit)
    return Schedule(
        fixed_blocks(config),
        probability,
        commit,
        remask=take_back,
        scope="block",
        reads={HELD: lambda scored: scored.held_log_prob.exp()},
    )


def mean_of_known(values: Tensor) -> Tensor:
    """The mean `[R]` of what is not negative in `[R, W]`; 1 where there is nothing."""
    known = values >= 0
    mean = values.clamp(min=0).sum(-1) / known.sum(-1).clamp(min=1)
    return torch.where(known.any(-1), mean, 1.0)
