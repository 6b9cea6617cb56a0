"""What an unmasking policy is asked about inside a model's forward, where it learns from the same hidden states.

Owns which states are those of the canvas's slots, where the policy is looked for, and that its file goes wherever the
model goes; what it makes of states is `rl4dlm.rollout.policies`'. A policy is part of whatever the model is wrapped in,
so that wrappers see its gradients.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from rl4dlm.files import writing
from rl4dlm.models.adapters import base_model

ATTRIBUTE = "unmasking_policy"
"""Where a model has its policy."""

POLICY_FILE = "unmasking_policy.safetensors"
"""What a folder with a model has its policy in."""


def policy_file(model: Any) -> Path | None:
    """The file of the policy in the folder that a model, or the adapter on it, was loaded from; None: there is none."""
    base = base_model(model)
    for part in (model, base):  # an adapter's folder before that of its base
        folder = getattr(part, "loaded_from", None)
        if folder is not None and Path(folder, POLICY_FILE).is_file():
            return Path(folder, POLICY_FILE)
    return None


def write_policy(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes the policy of a model into a folder that the model is saved in: that on it, or else a copy of its file."""
    base = base_model(model)
    policy, file = getattr(base, ATTRIBUTE, None), policy_file(model)
    target = Path(folder, POLICY_FILE)
    if policy is not None:
        policy.save(target)
    elif file is not None and file.resolve() != target.resolve():
        with writing(target) as opened:
            opened.write(file.read_bytes())


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
