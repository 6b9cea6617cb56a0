"""What an unmasking policy is asked about inside a model's forward, where it learns from the same hidden states.

Owns which states are those of the canvas's slots and where the policy is looked for; what it makes of them is
`rl4dlm.rollout.policies`'. A policy is part of whatever the model is wrapped in, so that wrappers see its gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

ATTRIBUTE = "unmasking_policy"
"""Where a model has its policy."""


def slot_states(hidden: Tensor, slots: int, shift: int, rows: Tensor | None) -> Tensor:
    """The states `[N, W, D]` that the tokens of the last W columns are predicted from.

    Args:
        hidden: `[R, T, D]`. slots: W. shift: of the logits. rows: long `[N]`, rows of `hidden`; None: all of them.
    """
    stop = hidden.shape[1] - shift
    states = hidden[:, stop - slots : stop]
    return states if rows is None else states[rows]


def choice_scores(model: Any, states: Tensor, order: Tensor, flags: Tensor, time: Tensor) -> Tensor:
    """Log-probabilities `[N, L]` of the choices that steps made, one per chosen slot, 0 elsewhere.

    Args:
        states: `[N, L, D]`. order: long `[N, L]`, the place of a slot among those that the step chose, from 1; 0: it
            did not. flags: bool `[N, L, 3]`, slots that were open, that were in the active block, that there were.
        time: `[N]`, the share of steps that was done.

    Raises ValueError if the model has no policy.
    """
    policy = getattr(model, ATTRIBUTE, None)
    if policy is None:
        raise ValueError(f"score_order needs an unmasking policy, and this {type(model).__name__} has none")
    found: Tensor = policy.log_factors(states, order, flags, time)
    return found
