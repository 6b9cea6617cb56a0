"""The best of a row's slots: by rank, the first so many, or the one.

Owns how ties are broken: the lower position first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """The best `counts` `[R]` eligible positions of each row, the lower position among equals: bool `[R, W]`."""
    return (ranks(scores, eligible) < counts[:, None]) & eligible


def best(scores: Tensor, eligible: Tensor) -> Tensor:
    """The best eligible position of each row, the lower one among equals: bool `[R, W]`, none where none is."""
    allowed = scores.masked_fill(~eligible, -torch.inf)
    highest = (allowed == allowed.amax(-1, keepdim=True)) & eligible
    return highest & (highest.cumsum(-1) == 1)


def ranks(scores: Tensor, eligible: Tensor) -> Tensor:
    """The rank of each eligible position in its row, 0 for the highest score, the lower position first among equals.

    Args:
        scores: `[R, W]`. eligible: bool `[R, W]`.

    Returns:
        long `[R, W]`; the others come behind.
    """
    scores = scores if scores.is_floating_point() else scores.double()
    above = scores.clamp(min=torch.finfo(scores.dtype).min)  # so that eligible ones are never with the others
    sorted_by = above.masked_fill(~eligible, -torch.inf)
    order = sorted_by.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
