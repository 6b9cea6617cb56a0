"""Attention that opens up from causal to full while a model is adapted (DiffuLLaMA, arXiv 2410.17891, section 3).

Owns which pairs of tokens are still hidden from each other at a step. Each token sees those before it and itself, and
each of those behind it with a probability that rises linearly from 0 to 1; pairs are drawn anew at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.noise import keyed_uniform


def check_annealing(steps: Any) -> None:
    """Raises ValueError for an `attention_annealing_steps` that is no whole number from 0 on."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"attention_annealing_steps={steps!r} is not allowed; it must be a whole number, 0 or larger")


def unseen_pairs(seed: int, examples: Tensor, step: int, steps: int, width: int) -> Tensor | None:
    """Which tokens do not see which at an optimizer step; None once attention is full.

    Args:
        seed: of the run. examples: long `[B]`, numbers of the examples.
        step: optimizer steps made. steps: of the annealing, 0 for none. width: T, tokens of a row.

    Returns:
        bool `[B, T, T]`, true where the token of the second axis does not see that of the third.
    """
    if step >= steps:
        return None
    place = torch.arange(width, device=examples.device)
    query, key = place[:, None], place
    drawn = keyed_uniform(seed, "attention annealing", examples[:, None, None], place.new_tensor(step), query, key)
    return (key > query) & (drawn >= step / steps)
