"""Rewards of several goals, each on a scale of its own before they are added: being right, and being fast.

Owns the formulas. Rewards are `[N, G]`, G completions for each of N prompts, NaN where one could not be scored.

A sum of raw rewards lets the goal with the larger spread decide. Normalised apart (GDPO of NVIDIA, arXiv 2601.05242;
LightningRL, arXiv 2603.13319), each has its say; but then a wrong answer that is fast enough earns more than a right
one that is slow: of eight completions with two right ones, a wrong one at twice the speed of the others gets the
largest sum. With a gate, speed counts among right completions alone, and a wrong one earns nothing for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import check_choice

NORMS = ("z_score", "min_max", "none")
ADVANTAGE_NORMS = ("batch", "group", "center")


def normalised(rewards: Tensor, kind: str, among: Tensor | None = None) -> Tensor:
    """Rewards of each prompt on one scale, float64 `[N, G]`; 0 where they are NaN or not `among` those compared.

    Args:
        rewards: `[N, G]`.
        kind: `"z_score"`, less their mean and over their standard deviation, the population's; 0 where that is 0.
            `"min_max"`, from 0 to 1; 1/2 where all are equal. `"none"`, as they are.
        among: bool `[N, G]`, the completions that are compared; None: all.
    """
    check_choice("normalisation", kind, NORMS)
    values, known = rewards.double(), ~rewards.isnan()
    known = known if among is None else known & among
    if kind == "none":
        return torch.where(known, values, 0.0)
    if kind == "min_max":
        low = values.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
        high = values.masked_fill(~known, -torch.inf).amax(-1, keepdim=True)
        scaled = torch.where(high > low, (values - low) / (high - low), 0.5)
        return torch.where(known, scaled, 0.0)
    hidden, count = torch.where(known, values, 0.0), known.sum(-1, keepdim=True).clamp(min=1)
    around = torch.where(known, values - hidden.sum(-1, keepdim=True) / count, 0.0)
    deviation = (around.square().sum(-1, keepdim=True) / count).sqrt()
    # The mean of equal rewards may differ from them in the last digit.
    size = hidden.abs().amax(-1, keepdim=True)
    return torch.where(deviation > 1e-12 * size, around / deviation.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def kept_groups(right: Tensor, speed: Tensor, least_range: float) -> Tensor:
    """bool `[N]`, the prompts with a right completion, and with completions that differ in speed by `least_range`.

    Args:
        right: bool `[N, G]`. speed: `[N, G]`; NaN is left out.
    """
    low = speed.nan_to_num(nan=torch.inf).amin(-1)
    high = speed.nan_to_num(nan=-torch.inf).amax(-1)
    return right.any(-1) & (high - low >= least_range)


def group_advantages(rewards: Tensor, kind: str, kept: Tensor, known: Tensor | None = None) -> Tensor:
    """Advantages, float64 `[N, G]`, from rewards of prompts that are `kept` (bool `[N]`); 0 for the others.

    Args:
        rewards: `[N, G]`, without NaN.
        known: bool `[N, G]`, the completions that could be scored: the others have 0 and are in no mean; None: all.
        kind: `"batch"`, less the mean of all and over their standard deviation; `"group"`, the same for each prompt;
            `"center"`, less each prompt's mean. The deviation is the unbiased one, and at least 1e-8.
    """
    check_choice("advantage_norm", kind, ADVANTAGE_NORMS)
    there = kept[:, None].expand_as(rewards) if known is None else kept[:, None] & known
    over = (0, 1) if kind == "batch" else (1,)
    count = there.sum(over, keepdim=True)
    values = torch.where(there, rewards.double(), 0.0)
    around = torch.where(there, values - values.sum(over, keepdim=True) / count.clamp(min=1), 0.0)
    if kind == "center":
        return around
    deviation = (around.square().sum(over, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(count > 1, around / deviation.clamp(min=1e-8), around)
