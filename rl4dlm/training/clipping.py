"""How far a policy ratio may carry a loss, whatever it is the ratio of: a token, a view, a step or a sequence.

Owns the formulas of one ratio and the self-normalisation of weights. What the ratio is of, and how losses are averaged,
is the business of the one who asks. With rho the ratio, A the advantage, L the log-probability that rho is of, and
[1 - low, 1 + high] the range of a `Clip`, the losses are

    ppo            -min(rho A, clip(rho) A)
    log            the same function, of log rho: what is clipped is never exponentiated
    unconditional  -sg(clip(rho)) A L
    none           -rho A

PPO's minimum leaves a unit unclipped where A < 0 and rho is large, so that its gradient grows with rho, an estimate
gone wrong or not; an unconditional clip bounds the gradient by (1 + high) |A| |grad L| whatever the sign of A
(StableDRL, arXiv 2603.06743). It does not stop the gradient of what is clipped, either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.losses import weighted_likelihood

CLIPS = ("ppo", "log", "unconditional", "none")
SELF_NORMALIZE = ("none", "group", "batch")
_LARGEST = 1e300  # stands for weights that overflow, and leaves room to add them up


@dataclass(frozen=True)
class Clip:
    """A clip range of policy ratios, and what is done with what lies outside of it.

    Args:
        kind: one of `CLIPS`; see the module.
        low, high: ratios are clipped to [1 - low, 1 + high], 0 or larger; `high` None: `low`. With `low` 1 or larger
            there is no lower end, with `high` infinite no upper one. `"none"` reads neither.
        dual: c > 1 + high, an upper bound c |A| of the loss where A < 0 (dual-clip PPO, arXiv 1912.09729), for `"ppo"`
            and `"log"`; None: none.

    Raises:
        ValueError: names the argument, the value and what is allowed.
    """

    kind: str = "ppo"
    low: float = 0.2
    high: float | None = None
    dual: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, CLIPS)
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} is not allowed; it must be 0 or larger")
        if self.dual is not None and self.kind not in ("ppo", "log"):
            raise ValueError(f"dual={self.dual} is not allowed with kind={self.kind!r}; choose ppo or log, or None")

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest ratio that is not clipped."""
        return max(0.0, 1 - self.low), 1 + (self.low if self.high is None else self.high)


def surrogate(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """The loss of each unit, as the module says (PPO: arXiv 1707.06347; GRPO: arXiv 2402.03300).

    Args:
        log_ratio: log rho of each unit, any shape.
        log_probs: L, of the same shape, with its gradient; read by an unconditional clip alone.
        advantages: broadcast against it.
        clip: the range and what is done outside of it.

    Returns:
        Of the shape of all together.
    """
    if clip.kind == "unconditional":
        return weighted_likelihood(log_probs, importance_weights(log_ratio, clip).to(log_probs) * advantages)
    if clip.kind == "log":
        return -advantages * bounded_log_ratio(log_ratio, advantages, clip).exp()
    return ratio_surrogate(log_ratio.exp(), advantages, clip)


def ratio_surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """`surrogate` of something that stands for the ratio rho itself, such as a bound of it.

    Raises:
        ValueError: a clip of log-ratios or weights, of which there are none.
    """
    if clip.kind not in ("ppo", "none"):
        raise ValueError(f"kind={clip.kind!r} is not allowed for what stands for a ratio; choose ppo or none")
    gain = ratio * advantages
    if clip.kind == "ppo":
        gain = torch.min(gain, ratio.clamp(*clip.range) * advantages)
        if clip.dual is not None:
            gain = torch.where(advantages < 0, torch.max(gain, clip.dual * advantages), gain)
    return -gain


def bounded_log_ratio(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """Log-ratios, and where PPO's minimum takes the clipped ratio the end of the range, which has no gradient.

    `-A exp` of it is PPO's loss, as EBPO computes it (arXiv 2602.08676): with A >= 0 nothing can overflow.
    """
    low, high = clip.range
    least = math.log(low) if low else -math.inf
    most = math.inf if clip.dual is None else math.log(clip.dual)
    return torch.where(advantages >= 0, log_ratio.clamp(max=math.log(high)), log_ratio.clamp(least, most))


@torch.no_grad()
def importance_weights(log_ratio: Tensor, clip: Clip) -> Tensor:
    """Ratios clipped on both sides whatever the advantage, float64 of the shape of `log_ratio`, as constants."""
    low, high = clip.range
    return log_ratio.double().exp().clamp(low, min(high, _LARGEST))


@torch.no_grad()
def clipped_units(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Which units the range acts on at its lower and at its upper end, bool of the shape of `log_ratio`.

    With PPO's minimum these are ratios below it where A < 0 and above it where A > 0 (`advantages` are broadcast); the
    others have their gradient.
    """
    (low, high), ratio = clip.range, log_ratio.exp()
    below, above = ratio < low, ratio > high
    if clip.kind == "none":
        return torch.zeros_like(below), torch.zeros_like(above)
    if clip.kind == "unconditional":
        return below, above
    return below & (advantages < 0), above & (advantages > 0)


def _alone(values: Tensor) -> Tensor:
    return values


@torch.no_grad()
def self_normalised(
    weights: Tensor,
    groups: Tensor,
    kind: str = "group",
    counts: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Weights over the mean of their group's, or of all of them: their mean is 1, and a mean of losses is a sum of
    losses times `w_j / sum of w_i` (self-normalised importance sampling; StableDRL, arXiv 2603.06743).

    Equal weights become exactly 1, and a factor that all weights of a group have in common changes nothing.

    Args:
        weights: `[B, ...]`, one of each unit, 0 or larger.
        groups: long `[B]`, which group a row belongs to.
        kind: `"group"`, `"batch"` (all rows are one group), or `"none"`: weights stay as they are.
        counts: bool of the shape of `weights`, the units that a loss has; None: all. The others have no share.
        gather: rows of all processes from those of this one, `[B, ...] -> [N, ...]`, where groups are split.

    Returns:
        float64 `[B, ...]`; 0 where a group has no weight at all.
    """
    check_choice("self_normalize", kind, SELF_NORMALIZE)
    if kind == "none":
        return weights.double()
    if kind == "batch":
        groups = torch.zeros_like(groups)
    means = group_means(weights, groups, counts, gather)
    each = means.view(-1, *[1] * (weights.dim() - 1))
    return torch.where(each > 0, weights / each.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


@torch.no_grad()
def effective_share(
    weights: Tensor,
    groups: Tensor,
    counts: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Effective sample size of a row's group over its number of units, float64 `[B]`: 1 where all weights are equal.

    Arguments are those of `self_normalised`.
    """
    means = group_means(weights, groups, counts, gather)
    squares = group_means(weights.double().square(), groups, counts, gather)
    return torch.where(squares > 0, means.square() / squares.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def group_means(values: Tensor, groups: Tensor, counts: Tensor | None, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of `values` `[B, ...]` over the units of each row's group that count, float64 `[B]`."""
    values = values.double()
    counted = torch.ones_like(values) if counts is None else counts.expand_as(values).to(values)
    of_rows = torch.stack([values * counted, counted], dim=1).reshape(len(values), 2, -1).sum(-1)  # [B, 2]
    everyone, place = torch.unique(gather(groups), return_inverse=True)
    sums = torch.zeros(len(everyone), 2, dtype=torch.float64, device=values.device)
    total, number = sums.index_add_(0, place, gather(of_rows)).unbind(1)
    return (total / number.clamp(min=1))[torch.searchsorted(everyone, groups)]
