"""What reward functions are told of how a completion was decoded, beside the columns of the dataset (A11).

Owns the names and what they mean; they are part of the contract of reward plug-ins (`docs/rewards.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl4dlm.rollout.rollout import Rollout

ROLLOUT_COLUMNS = ("nfe", "denoising_steps", "tokens_per_forward", "stop_reason", "rollout")
"""Keywords of reward functions, one value per completion; `rollout`, for those that name it, is the whole `Rollout`."""


def rollout_columns(rollout: Rollout) -> dict[str, list[Any]]:
    """Lists with one entry per row.

    - `nfe`: int, forwards that the row took part in; guidance counts two.
    - `denoising_steps`: int, steps of its schedule.
    - `tokens_per_forward`: float, canvas tokens that it wrote, over `nfe`.
    - `stop_reason`: str, see `rl4dlm.rollout.rollout.StopReason`.
    """
    written = (rollout.trace.commit_step >= 0).sum(-1)
    return {
        "nfe": rollout.nfe.tolist(),
        "denoising_steps": rollout.trace.steps.tolist(),
        "tokens_per_forward": (written / rollout.nfe.clamp(min=1)).tolist(),
        "stop_reason": [str(reason) for reason in rollout.stop_reason],
    }


def with_rollout(inputs: Sequence[Mapping[str, Any]], rollout: Rollout) -> list[dict[str, Any]]:
    """Copies of a dataset's rows with those columns, and `rollout` itself in each."""
    columns = {**rollout_columns(rollout), "rollout": [rollout] * len(rollout)}
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(inputs)]
