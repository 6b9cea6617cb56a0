"""Advantages that TRL lacks, from the rewards of groups; what several algorithms share.

Rewards are `[N, G]`, G completions for each of N prompts, NaN where one could not be scored; so are advantages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

BASELINES = ("group_mean", "leave_one_out")


def leave_one_out(rewards: Tensor) -> Tensor:
    """A reward minus the mean of the group's others (RLOO, arXiv 2402.14740): G / (G - 1) times r - mean of r.

    The baseline of a completion does not depend on its own reward. Zero where no other completion could be scored.
    """
    scored = (~rewards.isnan()).sum(-1, keepdim=True)
    above = rewards - rewards.nanmean(-1, keepdim=True)
    return above * scored / (scored - 1).clamp(min=1)


def scaled(advantages: Tensor, rewards: Tensor, scale_rewards: str) -> Tensor:
    """Advantages over the standard deviation of rewards in each `"group"`, in the `"batch"`, or as they are (`"none"`).

    As in TRL, the deviation is the unbiased one, and 1e-4 is added to it.
    """
    if scale_rewards == "none":
        return advantages
    deviation = nanstd(rewards, dim=1, keepdim=True) if scale_rewards == "group" else nanstd(rewards)
    scaled: Tensor = advantages / (torch.as_tensor(deviation).nan_to_num(nan=0.0) + 1e-4)
    return scaled


def z_scores(rewards: Tensor) -> Tensor:
    """Rewards above their group's mean, over its population standard deviation; 0 where all are equal."""
    above = rewards - rewards.nanmean(-1, keepdim=True)
    deviation = above.square().nanmean(-1, keepdim=True).sqrt()
    equal = ((rewards == rewards[:, :1]) | rewards.isnan()).all(-1, keepdim=True)
    return torch.where(equal, torch.zeros_like(above), above / torch.where(equal, 1.0, deviation))


def above_baseline(rewards: Tensor, baseline: str, scale_rewards: str) -> Tensor | None:
    """Advantages over one of `BASELINES`; None for the group's mean, which is TRL's own."""
    return None if baseline == "group_mean" else scaled(leave_one_out(rewards), rewards, scale_rewards)


def check_baseline(config: Any) -> None:
    """Refuses an unknown `baseline` of a config, and one that its other settings would leave without effect."""
    if config.baseline not in BASELINES:
        raise ValueError(f"baseline={config.baseline!r} is not allowed; choose one of {', '.join(BASELINES)}")
    if config.baseline != "group_mean" and config.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={config.multi_objective_aggregation!r} has a baseline of its own and is not "
            f"allowed with baseline={config.baseline!r}; choose sum_then_normalize, or baseline='group_mean'"
        )


def softmax_weights(scores: Tensor, over: str = "group") -> Tensor:
    """`exp(s_i) / sum_j exp(s_j)`, float64 `[N, G]`, over each `"group"`; or over the `"batch"`, times N.

    They add up to 1 in each group, or on average over groups. Completions with a NaN have weight 0.
    """
    scores = scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if over == "batch":
        return (scores.flatten().softmax(-1) * len(scores)).view_as(scores).nan_to_num(nan=0.0)
    return scores.softmax(-1).nan_to_num(nan=0.0)
