"""A canvas on its way: what a row was after some of its steps, so that decoding can go on from there.

Owns what such a state holds, and the row ids of branches. States come from `Rollout.state_at`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.noise import mixed_ids


@dataclass(frozen=True)
class State:
    """N canvases that are partly written. What is written was drawn by the policy, unless it is `hinted`.

    Args:
        canvas: long `[N, L]`; what open slots hold is not looked at.
        commit_step: long `[N, L]`, the step at which a token was drawn; -1 at open and at given slots.
        steps: long `[N]`, steps made so far; each `commit_step` is below it.
        hinted: bool `[N, L]`, slots that were given.
        raw_log_prob, confidence: float `[N, L]`, as in `Trace`; 0 at -1.
        log_prob: float `[N, L]`, or None where the tokens were drawn at temperature 0.
        entropy: float `[N, L]`, or None where it was not recorded.
        block_stop: long `[N, L]`, as in `Trace`.
        exact: whether what is written was drawn from logits of full forwards, see `Rollout.exact`.
    """

    canvas: Tensor
    commit_step: Tensor
    steps: Tensor
    hinted: Tensor
    raw_log_prob: Tensor
    confidence: Tensor
    log_prob: Tensor | None
    entropy: Tensor | None
    block_stop: Tensor
    exact: bool = True

    def __len__(self) -> int:
        return len(self.canvas)

    def to(self, device: Any) -> State:
        """The same states on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def take(self, rows: Sequence[int] | Tensor) -> State:
        """The states of these rows, in this order; a row may come several times."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.canvas.device)
        tensors: dict[str, Any] = {
            name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)


def branch_row_ids(parents: Sequence[int], steps: Sequence[int], branches: int) -> list[int]:
    """Row ids of branches: `branches` of each parent, those of a parent one after another.

    They follow from the parent's row id, the step at which it branches and the number of the branch, so that branches
    draw apart from each other, from what the parent itself drew, and from those of another step; and are the same in
    any batch. With the parent's own row id instead, a row goes on as the parent did.

    Args:
        parents: row ids. steps: steps that each parent had made. branches: per parent, 1 or more.

    Returns:
        `len(parents) * branches` integers from 0 to 2^63 - 1.

    Raises ValueError for no branches, or another number of steps than of parents.
    """
    if branches < 1:
        raise ValueError(f"branches={branches} is not allowed; it must be 1 or larger")
    if len(steps) != len(parents):
        raise ValueError(f"steps has {len(steps)} entries; one per parent is needed: {len(parents)}")
    parent, step = torch.tensor([list(parents), list(steps)], dtype=torch.long).view(2, -1, 1)
    found: list[int] = mixed_ids("branch", parent, step, torch.arange(branches)).flatten().tolist()
    return found
