"""A policy that decides of each open slot apart whether it is written now (Jazbec et al., arXiv 2512.09106).

Owns the network and the density of its choices. The network sees numbers, no hidden states and no tokens: how probable
the candidate of each open slot is, as a probability and as log-odds, which tell 0.99 from 0.9 as well as 0.9 from 0.5;
which slots are open, and how many steps were made for each slot of the canvas. It is one transformer block (DiT, arXiv
2212.09748) with rotary positions, whose output h says at temperature T

    u_i ~ Bernoulli(s_i),  s_i = sigmoid(h_i / T),        for open slots i; the slots with u_i = 1 are written.

Where nothing is drawn, the slot a of the largest h is written, or decoding would not get on. A choice C then has the
probability

    P(C) = prod_{i in C} s_i prod_{i not in C} (1 - s_i)                      [C != {a}],
    P({a}) = s_a prod_{i != a} (1 - s_i) + prod_i (1 - s_i) = prod_{i != a} (1 - s_i),

which sums to 1. Published code scores {a} as if it had been drawn: 0.192 where 0.32 is right, with s = (0.6, 0.5,
0.36), so that steps that had no choice look like choices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rl4dlm.rollout.policies.policy import Seen, UnmaskingPolicy
from rl4dlm.rollout.policies.saving import register

SLOW_START = -2.0
"""The output's first bias: a slot is written with probability 0.12 until something has been learnt."""
LEAST_CHANCE = 1e-4
"""Of a candidate to be wrong, or right, that log-odds tell from none."""


@register
class BernoulliPolicy(UnmaskingPolicy):
    """The network; with its first weights every slot has the same probability.

    It is meant to run in float64, so that a row's result does not hinge on the rows it is computed with.

    Args:
        hidden_size: D, a multiple of 2 times `heads`. heads: of the attention.

    Raises:
        ValueError: names the argument, the value and what is allowed.
    """

    kind = "bernoulli"

    def __init__(self, *, hidden_size: int = 128, heads: int = 2) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, 1 or larger")
        if hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size={hidden_size} is not allowed with heads={heads}; it must be a multiple of {2 * heads}"
            )
        self.hidden_size, self.heads = hidden_size, heads
        size = hidden_size
        with torch.device("meta"):
            self.slot = nn.Linear(3, size, dtype=torch.float64)
            self.time = nn.Linear(size, size, dtype=torch.float64)
            self.warp = nn.Linear(size, size, dtype=torch.float64)
            # Shift, scale and gate of both halves of the block, shift and scale before the output.
            self.modulation = nn.Linear(size, 8 * size, dtype=torch.float64)
            self.attention = nn.Linear(size, 3 * size, dtype=torch.float64)
            self.mixed = nn.Linear(size, size, dtype=torch.float64)
            self.wide = nn.Linear(size, 4 * size, dtype=torch.float64)
            self.narrow = nn.Linear(4 * size, size, dtype=torch.float64)
            self.output = nn.Linear(size, 1, dtype=torch.float64)

    @property
    def settings(self) -> dict[str, Any]:
        return {"hidden_size": self.hidden_size, "heads": self.heads}

    def initialise(self, generator: torch.Generator) -> None:
        """As in DiT: the block is the identity at first, and the output says nothing but its bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                module.bias.zero_()
        self.modulation.weight.zero_()
        self.output.weight.zero_()
        self.output.bias.fill_(SLOW_START)

    def forward(self, seen: Seen) -> Tensor:
        """h `[R, W]`, from the probabilities of candidates, `features` `[R, W, 1]`, in open slots of the active block,
        and the time; what other slots hold is not looked at."""
        like = self.output.weight
        is_open = (seen.masked & seen.inside).to(like.device)
        confidence = torch.where(is_open, seen.features.squeeze(-1).to(like), 0.0)
        odds = torch.where(is_open, confidence.logit(eps=LEAST_CHANCE), 0.0) / -math.log(LEAST_CHANCE)
        hidden = self.slot(torch.stack([confidence, odds, is_open.to(like)], dim=-1))  # [R, W, D]
        silu = nn.functional.silu
        when = self.warp(silu(self.time(self._waves(seen.time.to(like)))))
        parts = self.modulation(silu(when))[:, None].chunk(8, dim=-1)
        hidden = hidden + parts[2] * self.mixed(self._attended(_modulated(hidden, parts[0], parts[1])))
        inner = nn.functional.gelu(self.wide(_modulated(hidden, parts[3], parts[4])), approximate="tanh")
        hidden = hidden + parts[5] * self.narrow(inner)
        found: Tensor = self.output(_modulated(hidden, parts[6], parts[7])).squeeze(-1)
        return found

    def _waves(self, time: Tensor) -> Tensor:
        """`[n, D]`, sines and cosines of the time at frequencies from 1 to 1000."""
        half = self.hidden_size // 2
        steps = torch.arange(half, dtype=time.dtype, device=time.device) / max(half - 1, 1)
        angles = time[:, None] * 1000**steps
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def _attended(self, hidden: Tensor) -> Tensor:
        n, width, size = hidden.shape
        query, key, value = self.attention(hidden).view(n, width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _rotated(query), _rotated(key)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(n, width, size)


def most_wanted(utilities: Tensor, allowed: Tensor) -> Tensor:
    """The allowed slot of the largest utility, the first among equals: bool `[n, W]`, none where none is."""
    highest = utilities.masked_fill(~allowed, -torch.inf)
    found = (highest == highest.amax(-1, keepdim=True)) & allowed
    return found & (found.cumsum(-1) == 1)


def choose(utilities: Tensor, allowed: Tensor, uniform: Tensor | None) -> Tensor:
    """A choice, bool `[n, W]`: where a uniform number lies below s_i, or else the most wanted slot.

    Args:
        utilities: h / T `[n, W]`. allowed: bool `[n, W]`.
        uniform: numbers in (0, 1), `[n, W]`; None: greedy, the slots with s_i above 1/2.
    """
    drawn = utilities > 0 if uniform is None else uniform.to(utilities) < utilities.sigmoid()
    drawn = drawn & allowed
    return drawn | (most_wanted(utilities, allowed) & ~drawn.any(-1, keepdim=True))


def log_probability(utilities: Tensor, allowed: Tensor, chosen: Tensor) -> Tensor:
    """log P of choices, `[n]`, as the module says; 0 where there is nothing to choose.

    Args:
        utilities: h / T `[n, W]`. allowed, chosen: bool `[n, W]`, of which the second has some of the first.
    """
    chosen = chosen & allowed
    wanted = most_wanted(utilities.detach(), allowed)
    forced = wanted & (chosen == wanted).all(-1, keepdim=True)  # whether it was drawn or not makes no difference
    logsigmoid = torch.nn.functional.logsigmoid
    each = torch.where(chosen, logsigmoid(utilities), logsigmoid(-utilities))
    return torch.where(allowed & ~forced, each, 0.0).sum(-1)


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
    return normed * (1 + scale) + shift


def _rotated(values: Tensor) -> Tensor:
    """Rotary positions of queries or keys `[n, H, W, d]` (arXiv 2104.09864)."""
    width, half = values.shape[2], values.shape[3] // 2
    place = torch.arange(width, dtype=values.dtype, device=values.device)
    rates = 10_000 ** (-torch.arange(half, dtype=values.dtype, device=values.device) / half)
    angles = place[:, None] * rates
    first, second = values.split(half, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def entropy(utilities: Tensor, allowed: Tensor) -> Tensor:
    """Of the draws, `[n]` in nats, before a slot is written because nothing was drawn."""
    logsigmoid, share = torch.nn.functional.logsigmoid, utilities.sigmoid()
    each = -(share * logsigmoid(utilities) + (1 - share) * logsigmoid(-utilities))
    return torch.where(allowed, each, 0.0).sum(-1)
