"""The choices of slots that recorded steps made, as an unmasking policy is asked for their log-probabilities.

A view of one recorded step (`steps.py`) shows the state that the step chose in. Owns what else the policy must know of
it: which slots were open, which could be written, how far the row was, and which were chosen in which order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.likelihood.views import Rows, Views


@dataclass
class Choices:
    """What a policy is asked about K views of each row.

    Args:
        order: long `[B, K, L]`, the place of a slot among those that the step chose, from 1; 0: it did not.
        flags: bool `[B, K, L, 3]`, slots that were open, that were in the active block, that there were.
        time: float32 `[B, K]`, the share of steps that was done.
    """

    order: Tensor
    flags: Tensor
    time: Tensor

    @property
    def asked(self) -> dict[str, Tensor]:
        """Keywords of the model's forward, with the K views of a row one after another."""
        named = {"score_order": self.order, "score_flags": self.flags, "score_time": self.time}
        return {name: value.flatten(0, 1) for name, value in named.items()}


def choices_of(rows: Rows, views: Views, *, block_length: int | None, steps: int) -> Choices:
    """The choices of the steps that views are of, one step each.

    A step chose all slots that it wrote, those that are not scored included. Blocks are counted from the start of the
    canvas.

    Args:
        rows: with `commit_step`, and `facts.rank` of each drawn token. views: of single steps of these rows.
        block_length: of the blocks that were written left to right; None: the canvas is one. steps: of the canvas.

    Raises:
        ValueError: the order in which steps chose was not recorded, or a view is of several steps.
    """
    rank = None if rows.facts is None else rows.facts.rank
    if rows.commit_step is None or rank is None:
        raise ValueError("the order in which steps chose slots is needed: commit_rank of the rows was not recorded")
    if bool(((rows.commit_step >= 0) & (rank < 0)).any()):
        raise ValueError("the order in which steps chose slots is needed of every drawn token")
    length = rows.canvas_ids.shape[1]
    scored = views.scored  # [B, K, L]
    number = rows.commit_step[:, None].expand_as(scored)
    step = torch.where(scored, number, -1).amax(-1)  # [B, K]; -1: the view scores nothing
    if bool((scored & (number != step[..., None])).any()):
        raise ValueError("a view scores tokens of several steps, which made choices in other states than it shows")
    chosen = (number == step[..., None]) & (step >= 0)[..., None]
    order = torch.where(chosen, rank[:, None] + 1, 0)
    block = torch.arange(length, device=scored.device) // (block_length or length)
    active = block[scored.long().argmax(-1)]  # [B, K]
    masked = views.hidden[..., -length:] & (step >= 0)[..., None]
    exists = torch.ones_like(rows.valid) if rows.seen is None else rows.seen
    flags = [masked, block == active[..., None], exists[:, None].expand_as(scored)]
    return Choices(order, torch.stack(flags, dim=-1), step.clamp(min=0).float() / steps)
