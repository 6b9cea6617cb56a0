"""Latent refinement decoding (Zhu et al., arXiv 2510.11052): what is not written yet is fed as a mixture.

An open slot is fed `(1 - a) E[mask] + a * mean embedding` under the last prediction there, restricted to its most
probable tokens; `a` is the larger the lower the entropy of the prediction, at most `feedback`. First whole canvases are
refined without writing anything, until predictions hardly change. Then candidates are committed by a threshold while
the other slots are still fed mixtures; once the predictions in a block have settled, the rest of it is committed.

How much predictions change is measured by the mean KL divergence of each from the one before at the same slot. The
64 most probable tokens of the one before are kept, all others count as one, which can only lower the divergence.

The rule follows the paper's description, not code of its authors; the defaults are starting points. Refinement happens
once per row; each block settles on its own. What is recorded as log-probabilities holds for these inputs only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Scored, coarse_divergence, filtered
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CanvasInput, Schedule, Step, above, probability, top
from rl4dlm.rollout.schedules.registry import register
from rl4dlm.rollout.soft_inputs import mixed_embeddings

KEPT_TOKENS = 64
"""Most probable tokens that are kept of each prediction, to compare the next one with."""

BELIEF, CHANGE, MIXTURE, WEIGHT = "belief", "change", "mixture", "weight"
REFINING, CALM = "refining", "calm"


@dataclass(frozen=True)
class LatentRefinementArguments:
    """Settings of `latent_refinement`.

    Args:
        threshold: a candidate is committed when its probability reaches it, and always the best one.
        feedback: r, the largest weight of predictions in what is fed; 0 turns mixtures off, and with them refinement
            and settling, so that the threshold alone decides.
        nucleus: probability that the most probable tokens must reach to make up a mixture.
        refine_steps: most forwards before anything is committed.
        refine_divergence: refinement ends when the mean divergence over all open slots is smaller, in nats.
        settle_divergence: a block settles while the mean divergence over its open slots is smaller, in nats; 0: never.
        settle_steps: steps in a row that it must settle for before the rest of it is committed.
    """

    threshold: float = 0.9
    feedback: float = 0.15
    nucleus: float = 0.9
    refine_steps: int = 20
    refine_divergence: float = 0.01
    settle_divergence: float = 0.001
    settle_steps: int = 2

    def __post_init__(self) -> None:
        for name in ("threshold", "refine_divergence", "settle_divergence"):
            check_number(self, name, 0)
        check_number(self, "feedback", 0, 1)
        check_number(self, "nucleus", 0, 1)
        if self.nucleus == 0:
            raise ValueError(f"nucleus={self.nucleus!r} is not allowed; it must be larger than 0, at most 1")
        check_count(self, "refine_steps", 0)
        check_count(self, "settle_steps", 1)


@register("latent_refinement", LatentRefinementArguments, takes_steps=False)
def latent_refinement(arguments: LatentRefinementArguments, config: Any) -> Schedule:
    """Refines mixtures of tokens, then commits by a threshold, and the rest of a block once predictions settle."""
    reached = above(arguments.threshold)
    if arguments.feedback == 0:
        return Schedule(fixed_blocks(config), probability, reached)

    def commit(step: Step, scores: Tensor) -> Tensor:
        slots, rows = step.memory.slots, step.memory.rows
        for name in (BELIEF, MIXTURE, WEIGHT):
            slots[name] = step.read[name]
        refining = rows.get(REFINING, torch.ones_like(step.locked[:, 0]))
        unstable = _mean(step.read[CHANGE], step.masked) >= arguments.refine_divergence
        rows[REFINING] = refining = refining & unstable & (step.total_step < arguments.refine_steps)
        settled = _mean(step.read[CHANGE], step.eligible) < arguments.settle_divergence
        earlier = torch.where(step.step == 0, 0, rows.get(CALM, torch.zeros_like(step.step)))
        rows[CALM] = calm = torch.where(settled & ~refining, earlier + 1, 0)
        # Steps without a commit are allowed for the sake of refinement, so the engine would wait too long for one.
        chosen = reached(step, scores) | top(scores, step.eligible, torch.ones_like(calm))
        rest = (calm >= arguments.settle_steps)[:, None] & (scores > -torch.inf)  # deferred tokens wait
        return (chosen | rest) & ~refining[:, None]

    def mixture(scored: Scored) -> Tensor:
        assert scored.places.embedding is not None
        return mixed_embeddings(filtered(scored.log_probs, arguments.nucleus, 0).exp(), scored.places.embedding())

    return Schedule(
        fixed_blocks(config),
        probability,
        commit,
        scope="masked",
        reads={
            BELIEF: _belief,
            CHANGE: _change,
            MIXTURE: mixture,
            WEIGHT: lambda scored: feedback_weight(scored.entropy, scored.logits.shape[-1], arguments.feedback),
        },
        inputs=_mixed,
        patience=arguments.refine_steps,
    )


def feedback_weight(entropy: Tensor, vocabulary: int, largest: float) -> Tensor:
    """How much a prediction counts in what is fed: from 0 if it is uniform to `largest` if it is certain.

    Args:
        entropy: `[n]`, in nats. vocabulary: V. largest: r.

    Returns:
        `[n]`, `r (1 - entropy / log V)`.
    """
    return largest * (1 - entropy / math.log(vocabulary)).clamp(0, 1)


def _belief(scored: Scored) -> Tensor:
    """float64 `[n, k, 2]`, the most probable tokens and their log-probabilities."""
    values, tokens = scored.log_probs.topk(min(KEPT_TOKENS, scored.log_probs.shape[-1]))
    return torch.stack([tokens.double(), values.double()], -1)


def _change(scored: Scored) -> Tensor:
    """`[n]`, the divergence from the last prediction at the slot; infinite where there is none."""
    places = scored.places
    if BELIEF not in places.memory.slots:
        return torch.full_like(scored.logits[:, 0], torch.inf)
    tokens, before = places.memory.slots[BELIEF][places.rows, places.positions].unbind(-1)
    return coarse_divergence(scored.log_probs, tokens.long(), before.to(scored.log_probs.dtype))


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """`[R]`, the mean of `[R, W]` where bool `[R, W]` is True; infinite where it nowhere is."""
    mean = torch.where(where, values, 0.0).sum(-1) / where.sum(-1).clamp(min=1)
    return torch.where(where.any(-1), mean, torch.inf)


def _mixed(canvas: CanvasInput) -> Tensor:
    memory: Memory = canvas.memory
    if MIXTURE not in memory.slots:  # nothing is predicted yet
        return canvas.embeddings
    weight = memory.slots[WEIGHT][..., None].to(canvas.embeddings.dtype)
    mixed = (1 - weight) * canvas.embeddings + weight * memory.slots[MIXTURE]
    return torch.where(canvas.masked[..., None], mixed, canvas.embeddings)
