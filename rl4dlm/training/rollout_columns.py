"""What reward functions and losses are told of how a completion was decoded.

Owns the names and what they mean. Those of reward functions, which come beside the columns of the dataset, are part of
the contract of reward plug-ins (`docs/rewards.md`); those of the batch are what an algorithm may learn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.rollout import Events, Rollout, Trace

ROLLOUT_COLUMNS = ("nfe", "denoising_steps", "tokens_per_forward", "stop_reason", "rollout")
"""Keywords of reward functions, one value per completion; `rollout`, for those that name it, is the whole `Rollout`."""

FORWARD_COLUMNS = ROLLOUT_COLUMNS[:3]
"""Those that only rollouts with a record have."""


def rollout_columns(rollout: Rollout) -> dict[str, list[Any]]:
    """Lists with one entry per row; of rollouts without a record the first three are None.

    - `nfe`: int, forwards that the row took part in; guidance counts two.
    - `denoising_steps`: int, steps of its schedule.
    - `tokens_per_forward`: float, canvas tokens that it wrote, over `nfe`.
    - `stop_reason`: str, see `rl4dlm.rollout.rollout.StopReason`.
    """
    reasons = {"stop_reason": [str(reason) for reason in rollout.stop_reason]}
    if not rollout.recorded:
        return {**dict.fromkeys(FORWARD_COLUMNS, [None] * len(rollout)), **reasons}
    written = (rollout.trace.commit_step >= 0).sum(-1)
    return {
        "nfe": rollout.nfe.tolist(),
        "denoising_steps": rollout.trace.steps.tolist(),
        "tokens_per_forward": (written / rollout.nfe.clamp(min=1)).tolist(),
        **reasons,
    }


def with_rollout(inputs: Sequence[Mapping[str, Any]], rollout: Rollout) -> list[dict[str, Any]]:
    """Copies of a dataset's rows with those columns, and `rollout` itself in each."""
    columns = {**rollout_columns(rollout), "rollout": [rollout] * len(rollout)}
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(inputs)]


def recorded_columns(trace: Trace) -> dict[str, Tensor]:
    """The record of N rows as entries of a batch, batch first; what was not recorded is left out.

    - `commit_step`: long `[N, L]`, the row's own step that wrote a token; -1 where none was drawn.
    - `raw_log_probs`: float `[N, L]`, its log-probability then, under the model's own softmax.
    - `sampled_log_probs`: float `[N, L]`, under the distribution that it was drawn from; at a temperature above 0.
    - `commit_confidence`, `commit_entropy`: float `[N, L]`, of the untempered softmax after guidance and options.
    - `block_stop`: long `[N, L]`, end of the block that was active.
    - `commit_rank`: long `[N, L]`, its place among those that the step chose, where steps choose in an order.
    - `selection_log_probs`: float `[N, S]`, of the choice of slots, or of blocks, at each step; where one was drawn.
    - `policy_features`: float `[N, S, ...]`, `policy_allowed`, `policy_chosen`: bool `[N, S, A]`, what a learned policy
      saw, could choose from and chose at each step; if it was recorded.
    - `events`: long `[N, E, 4]`, step, kind, position and token of everything that happened to a row, in order, where
      schedules can take tokens back; rows of fewer events end in -1. `event_log_probs`: float `[N, E, 2]`, raw and as
      drawn; 0 there.
    """
    found = {
        "commit_step": trace.commit_step,
        "raw_log_probs": trace.raw_log_prob,
        "sampled_log_probs": trace.log_prob,
        "commit_confidence": trace.confidence,
        "commit_entropy": trace.entropy,
        "block_stop": trace.block_stop,
        "commit_rank": trace.commit_rank,
        "selection_log_probs": trace.selection_log_prob,
        "policy_features": trace.policy_features,
        "policy_allowed": trace.policy_allowed,
        "policy_chosen": trace.policy_chosen,
    }
    columns = {name: values for name, values in found.items() if values is not None}
    return columns if trace.events is None else columns | _events(trace.events, len(trace.commit_step))


def _events(events: Events, rows: int) -> dict[str, Tensor]:
    count = torch.bincount(events.row, minlength=rows)
    place = torch.arange(len(events), device=events.row.device) - (count.cumsum(0) - count)[events.row]
    shape = rows, int(count.max()) if rows else 0
    what = torch.stack([events.step, events.kind, events.position, events.token], dim=-1)
    how = torch.stack([events.raw_log_prob, events.log_prob], dim=-1)
    padded = what.new_full((*shape, 4), -1), how.new_zeros(*shape, 2)
    for dense, values in zip(padded, (what, how), strict=True):
        dense[events.row, place] = values
    return {"events": padded[0], "event_log_probs": padded[1]}
