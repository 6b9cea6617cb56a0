"""Dream's samplers (Ye et al., arXiv 2508.15487), and Fast-dLLM's threshold for them (arXiv 2505.22618).

Time runs from 1 to `eps` in S equal steps; a step from t to s writes a share `1 - s/t` of what is still masked, and the
last one writes the rest. `dream_origin` writes each position with that probability, whatever its candidate. The others
write a number of positions that follows from the share, those whose candidates are most certain: by the candidate's
probability (`dream_maskgit_plus`), by its distance between the two most probable tokens (`dream_topk_margin`) or by its
negative entropy (`dream_entropy`). With `alg_temp` above 0 the positions are drawn one after another without
replacement, with probabilities `softmax(certainty / alg_temp)`; the trace has the log-probability of these draws, as it
has that of `dream_origin`'s. `dream_threshold` has a budget of tokens per step, the same for each: the most certain one
is written, and others of the budget only if their certainty reaches a threshold; what is left of the budget is carried
to the next step, and after the last step it goes on until everything is written. So it needs S steps at least.

Unlike LLaDA's confidence, certainty is that of the tempered distribution after top-p and top-k, over the whole
vocabulary, also at temperature 0. The canvas is one block unless `block_length` says otherwise; then each block has its
own steps.

Differences from the released code: numbers of tokens are those of each row, not of the batch's mean; they are rounded
cumulatively, so that they are as even as they can be and no step writes nothing (the released code rounds each one
down, as `counts="floor"` does, and so writes nothing in the first step when S is the number of slots, and more in the
last); the mask token is no candidate; rows leave when they are full; the budget need not be a whole number per step;
top-k comes before top-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Scored, entropy_of
from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CommitRule, Schedule, Step, random_order, ranks, top
from rl4dlm.rollout.schedules.registry import register

EPS = 1e-3


@dataclass(frozen=True)
class DreamArguments:
    """Settings of `dream_maskgit_plus`, `dream_topk_margin` and `dream_entropy`.

    Args:
        alg_temp: temperature at which positions are drawn; 0 takes the most certain ones.
        counts: how a step's share becomes a number of tokens: `"round"` the cumulative number, or `"floor"` that of
            each step, as the released code does.
        eps: the time at which the last step ends, 0 to 1, for `"floor"` (there 0.001 by default); the even numbers of
            `"round"` do not depend on it.
    """

    alg_temp: float = 0.0
    counts: str = "round"
    eps: float | None = None

    def __post_init__(self) -> None:
        check_number(self, "alg_temp", 0)
        if self.alg_temp == math.inf:
            raise ValueError(f"alg_temp={self.alg_temp} is not allowed; it must be finite")
        if self.counts not in ("round", "floor"):
            raise ValueError(f'counts={self.counts!r} is not allowed; choose "round" or "floor"')
        if self.eps is not None:
            check_number(self, "eps", 0, 1)
            if self.counts != "floor":
                raise ValueError(f'eps={self.eps} has no meaning for counts={self.counts!r}, only for "floor"')


@dataclass(frozen=True)
class DreamOriginArguments:
    """Settings of `dream_origin`.

    Args:
        eps: the time at which the last step ends, 0 to 1.
    """

    eps: float = EPS

    def __post_init__(self) -> None:
        check_number(self, "eps", 0, 1)


@dataclass(frozen=True)
class DreamThresholdArguments:
    """Settings of `dream_threshold`.

    Args:
        threshold: certainty that candidates besides the most certain one need.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0)


@register("dream_origin", DreamOriginArguments)
def dream_origin(arguments: DreamOriginArguments, config: Any) -> Schedule:
    """Commits each position with the probability that ancestral sampling gives it; a step may write nothing."""
    steps = config.steps_per_block
    rule = each_with(time_shares(steps, arguments.eps))
    return Schedule(fixed_blocks(config), random_order, rule, patience=steps, draws_positions=True)


@register("dream_maskgit_plus", DreamArguments, fixed_forwards=True)
def dream_maskgit_plus(arguments: DreamArguments, config: Any) -> Schedule:
    """Commits the candidates of highest probability."""
    return _most_certain(candidate_probability, arguments, config)


@register("dream_topk_margin", DreamArguments, fixed_forwards=True)
def dream_topk_margin(arguments: DreamArguments, config: Any) -> Schedule:
    """Commits where the most probable token is furthest ahead of the second."""
    return _most_certain(margin, arguments, config)


@register("dream_entropy", DreamArguments, fixed_forwards=True)
def dream_entropy(arguments: DreamArguments, config: Any) -> Schedule:
    """Commits where the entropy is lowest."""
    return _most_certain(negative_entropy, arguments, config)


@register("dream_threshold", DreamThresholdArguments)
def dream_threshold(arguments: DreamThresholdArguments, config: Any) -> Schedule:
    """Commits at most an even number of candidates per step and what earlier steps left of theirs."""
    rule = within_budget(config.steps_per_block, arguments.threshold)
    reads = {"certainty": candidate_probability}
    return Schedule(fixed_blocks(config), certainty, rule, reads=reads, memoryless=True)


def _most_certain(reading: Any, arguments: DreamArguments, config: Any) -> Schedule:
    steps = config.steps_per_block
    if arguments.counts == "round":
        shares, patience = None, 0
    else:
        shares = time_shares(steps, EPS if arguments.eps is None else arguments.eps)
        patience = steps  # of its steps any may write nothing

    def rule(step: Step, scores: Tensor) -> Tensor:
        counts = rounded_counts(step, steps) if shares is None else floored_counts(step, shares)
        if arguments.alg_temp == 0:
            return top(scores, step.eligible, counts)
        return draw_positions(step, scores.double() / arguments.alg_temp, counts)

    drawn = arguments.alg_temp > 0
    return Schedule(
        fixed_blocks(config),
        certainty,
        rule,
        reads={"certainty": reading},
        patience=patience,
        draws_positions=drawn,
        memoryless=not drawn,
    )


# --- how certain candidates are ---------------------------------------------------------------------------------------


def candidate_probability(scored: Scored) -> Tensor:
    """`[n]`, the candidate's probability, tempered and filtered."""
    return scored.tempered.gather(-1, scored.token[:, None]).squeeze(-1).exp()


def margin(scored: Scored) -> Tensor:
    """`[n]`, by how much the most probable token is more probable than the second, tempered and filtered."""
    best = scored.tempered.topk(2, dim=-1).values.exp()
    return best[:, 0] - best[:, 1]


def negative_entropy(scored: Scored) -> Tensor:
    """`[n]`, in nats, of the tempered and filtered distribution."""
    return -entropy_of(scored.tempered)


def certainty(step: Step) -> Tensor:
    """Scores `[R, W]` that one of the readings above gave."""
    return step.read["certainty"]


# --- how many are written ---------------------------------------------------------------------------------------------


def time_shares(steps: int, eps: float) -> Tensor:
    """`[S]`, the share `1 - s/t` that each step writes of what is masked; 1 at the last. In float32 as released: the
    numbers that are rounded down can hinge on it."""
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    return torch.cat([1 - times[1:-1] / times[:-2], torch.ones(1)])


def floored_counts(step: Step, shares: Tensor) -> Tensor:
    """long `[R]`, each row's share of this step rounded down."""
    return (step.eligible.sum(-1).float() * _at(shares, step)).long()


def rounded_counts(step: Step, steps: int) -> Tensor:
    """long `[R]`: as many as make it `masked_at_start * (j + 1) / S`, rounded half up, after step j; one at least."""
    target = (2 * step.masked_at_start * (step.step + 1).clamp(max=steps) + steps) // (2 * steps)
    return (target - _written(step)).clamp(min=1)


def _written(step: Step) -> Tensor:
    """long `[R]`, slots that were written since the block was entered."""
    return step.masked_at_start - step.eligible.sum(-1)


def _at(values: Tensor, step: Step) -> Tensor:
    return values.to(step.tokens.device)[step.step.clamp(max=len(values) - 1)]


# --- which are written ------------------------------------------------------------------------------------------------


def each_with(shares: Tensor) -> CommitRule:
    """Commits every position independently with the probability of the step."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        share = _at(shares, step).double()[:, None].expand(scores.shape)
        deferred = scores.isneginf()  # such candidates wait for the last step
        chosen = step.eligible & torch.where(deferred, share == 1, scores < share)
        log_prob = torch.where(chosen, share.log(), (-share).log1p())
        step.selection_log_prob.add_(log_prob.masked_fill(deferred | ~step.eligible, 0.0).sum(-1))
        return chosen

    return rule


def draw_positions(step: Step, logits: Tensor, counts: Tensor) -> Tensor:
    """Commits `counts` `[R]` positions, drawn one after another without replacement from the softmax of `logits`,
    float64 `[R, W]`; adds the log-probability of the draws in their order (Plackett-Luce)."""
    gumbel = -(-step.uniform("order", step.eligible).log()).log()
    rank = ranks(logits + gumbel, step.eligible)  # the order of the draws
    ordered = torch.zeros_like(logits).scatter(-1, rank, logits.masked_fill(~step.eligible, -torch.inf))
    left = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    # Where only deferred candidates are left, with logits of -inf, the lower position goes first.
    log_prob = torch.where(ordered.isneginf(), 0.0, ordered - left)
    drawn = step.offsets < counts[:, None]
    step.selection_log_prob.add_(log_prob.masked_fill(~drawn, 0.0).sum(-1))
    return step.eligible & (rank < counts[:, None])


def within_budget(steps: int, threshold: float) -> CommitRule:
    """Commits the best candidates that reach the threshold, as far as an even number per step goes. Where none does,
    the best is written, as in every schedule."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        allowed = step.masked_at_start * (step.step + 1) // steps - _written(step)
        return top(scores, step.eligible, allowed) & (scores >= threshold)

    return rule
