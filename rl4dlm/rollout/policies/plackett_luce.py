"""Plackett-Luce: K slots drawn one after another without replacement, each in proportion to exp(utility).

With h the utilities, C the slots that may be drawn and u_1..u_K what is drawn, in this order,

    log p(u_1..u_K) = sum over k of  h_{u_k} - log sum over j in C without u_1..u_{k-1} of exp h_j

(LLaDOU, arXiv 2505.10446). It is the density of the *ordered* draw. The set that is written has the sum of it over all
K! orders; learning from the order too is unbiased and adds variance. Where all of C is drawn, as in the last step of a
block, the set is certain whatever the utilities are: there is no choice, and every term counts as 0.

Different from the released code, which exponentiates utilities as they are and subtracts what is drawn from their sum:
the sums here are logarithmic and run from the last slot to the first, so that nothing overflows or cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.rollout.ranking import ranks


def draw(utilities: Tensor, eligible: Tensor, counts: Tensor, uniforms: Tensor) -> Tensor:
    """An ordered draw of `counts` slots of each row.

    The slots of largest utility plus Gumbel noise, in this order, are distributed as the module's docstring says.

    Args:
        utilities: `[R, W]`. eligible: bool `[R, W]`, slots that may be drawn.
        counts: long `[R]`, how many; all eligible ones where there are fewer.
        uniforms: float64 `[R, W]` in (0, 1) where a slot is eligible, such as `Step.uniform` gives.

    Returns:
        long `[R, W]`: the place of each drawn slot in its row's order, from 0; -1 elsewhere.
    """
    gumbel = -(-uniforms.clamp(min=torch.finfo(torch.float64).tiny).log()).log()
    return greedy(utilities.double() + gumbel, eligible, counts)


def greedy(utilities: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """The slots of largest utility in this order, the lower slot first among equals; as `draw` returns them."""
    place = ranks(utilities, eligible)
    return torch.where(eligible & (place < counts[:, None]), place, -1)


def log_factors(utilities: Tensor, eligible: Tensor, order: Tensor) -> Tensor:
    """The terms of the log density, one per drawn slot; they add up to it over a row.

    Args:
        utilities: `[R, W]`, with gradients if there are any. eligible: bool `[R, W]`, slots that could be drawn.
        order: long `[R, W]`, places of the drawn slots, which are eligible ones, from 0 without gaps; -1 elsewhere.

    Returns:
        `[R, W]` in float32 or the dtype of the utilities, whichever is wider; 0 at slots that were not drawn, and in
        rows where all eligible ones were.

    Raises:
        ValueError: a drawn slot is not eligible.
    """
    drawn = order >= 0
    if bool((drawn & ~eligible).any()):
        row, slot = (drawn & ~eligible).nonzero()[0].tolist()
        raise ValueError(f"slot {slot} of row {row} was drawn, but is not eligible: its probability is 0")
    utilities = utilities.to(torch.promote_types(utilities.dtype, torch.float32))
    left = eligible & ~drawn
    chosen = drawn & left.any(-1, keepdim=True)  # where something is left over, there was a choice
    lowest = torch.finfo(utilities.dtype).min
    # What is left over, or a 0 that nobody reads where nothing is.
    rest = torch.where(left.any(-1), utilities.masked_fill(~left, lowest).logsumexp(-1), 0.0)
    # The picks from the last to the first, behind them padding, which a running sum never looks at.
    late = torch.where(chosen, -order, 1).argsort(dim=-1, stable=True)  # [R, W], slots
    picks = torch.where(chosen, utilities, 0.0).gather(-1, late)
    remaining = torch.cat([rest[:, None], picks], dim=-1).logcumsumexp(-1)[:, 1:]
    factors = picks - remaining
    return torch.zeros_like(factors).scatter(-1, late, torch.where(chosen.gather(-1, late), factors, 0.0))


def log_density(utilities: Tensor, eligible: Tensor, order: Tensor) -> Tensor:
    """`[R]`, of ordered draws; see `log_factors`."""
    return log_factors(utilities, eligible, order).sum(-1)
