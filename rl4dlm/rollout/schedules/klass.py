"""KLASS (Kim et al., arXiv 2511.05664): tokens are written when they are confident and have stopped changing.

A candidate is ready when its probability is above a threshold and, for some steps in a row, the distribution at its
position moved by less than a Kullback-Leibler divergence from that of the step before. All that are ready are written;
a step with none of them writes its even share of the block, the most confident ones, and at least one. So a block may
take more steps than it was given, where few are ready at a time.

The divergence is taken over the most probable tokens of the step before, one by one, and all others together, since
keeping whole distributions costs the vocabulary for every slot. It is exact where these are the whole vocabulary, and
otherwise at most the true one.

Differences from the released code: there masks are left when the steps are over, here decoding goes on; its confidences
at a temperature above 0 are those of noised logits, its history runs on from block to block, and its entropy option
prefers the least certain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Reading, Scored, coarse_divergence
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CommitRule, Schedule, Step, even_counts, probability, top
from rl4dlm.rollout.schedules.registry import register

TOKENS, LOG_PROBS, DIVERGENCE, STEADY = "klass_tokens", "klass_log_probs", "klass_divergence", "klass_steady"


@dataclass(frozen=True)
class KLASSArguments:
    """Settings of `klass`.

    Args:
        threshold: probability that a ready candidate exceeds; above 1 none does, which leaves `low_confidence`.
        kl_threshold: divergence in nats that it stays below. history: for that many steps in a row.
        kl_tokens: most probable tokens that the divergence tells apart.
    """

    threshold: float = 0.9
    kl_threshold: float = 0.01
    history: int = 2
    kl_tokens: int = 64

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)
        check_number(self, "kl_threshold", 0)
        check_count(self, "history", 1)
        check_count(self, "kl_tokens", 1)


@register("klass", KLASSArguments)
def klass(arguments: KLASSArguments, config: Any) -> Schedule:
    """Commits what is confident and stable; where nothing is, an even number."""
    reads: dict[str, Reading] = {
        TOKENS: lambda scored: likeliest(scored, arguments.kl_tokens)[1],
        LOG_PROBS: lambda scored: likeliest(scored, arguments.kl_tokens)[0],
        DIVERGENCE: divergence,
    }
    return Schedule(fixed_blocks(config), probability, ready(arguments, config.steps_per_block), reads=reads)


def likeliest(scored: Scored, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids `[n, k]` of the most probable tokens."""
    values, ids = scored.log_probs.topk(min(count, scored.log_probs.shape[-1]), dim=-1)
    return values, ids


def divergence(scored: Scored) -> Tensor:
    """`[n]`, divergence in nats of each distribution from that of the step before; meaningless where there is none."""
    kept = scored.places.memory.slots
    if TOKENS not in kept:
        return torch.full_like(scored.logits[:, 0], torch.inf)
    at = (scored.places.rows, scored.places.positions)
    return coarse_divergence(scored.log_probs, kept[TOKENS][at], kept[LOG_PROBS][at])


def ready(arguments: KLASSArguments, steps: int) -> CommitRule:
    """Commits what is confident and was stable for long enough, or else the best, the step's share of the block."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        steady = _steady(step, arguments.kl_threshold)
        chosen = step.eligible & (scores > arguments.threshold) & (steady >= arguments.history)
        share = even_counts(step.masked_at_start, steps, step.step).clamp(min=1)
        return torch.where(chosen.any(-1, keepdim=True), chosen, top(scores, step.eligible, share))

    return rule


def _steady(step: Step, limit: float) -> Tensor:
    """long `[R, W]`, steps in a row, this one included, that brought little change; remembers this step."""
    slots, started = step.memory.slots, (step.step > 0)[:, None]  # a block's first step has nothing to compare with
    calm = (step.read[DIVERGENCE] < limit) & started
    steady = torch.where(calm, slots.get(STEADY, torch.zeros_like(step.tokens)) + 1, 0)
    slots[STEADY], slots[TOKENS], slots[LOG_PROBS] = steady, step.read[TOKENS], step.read[LOG_PROBS]
    return steady
