"""Policies that look at the model's hidden states: LLaDOU's module, and a linear head.

LLaDOU's Unmasking Policy Module (arXiv 2505.10446) reads the last hidden states of all slots of the
canvas. With e_i = time(s / S) + embedding of "is masked" + embedding of "is in the active block", and

    AdaLN(x, e) = LayerNorm(x) (1 + scale(e)) + shift(e),

the utility of slot i is a linear function of AdaLN(block(AdaLN(x, e)), e), block being a transformer block over the
canvas. Here it is a bidirectional one of the Llama kind with rotary positions counted from the canvas's first slot; the
paper does not describe it further, and `layers=0` leaves it out. The last layer starts at 0, so that all orders are
equally likely before any training.

Both run in float32 or wider, whatever the model is in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rl4dlm.rollout.policies import plackett_luce
from rl4dlm.rollout.policies.policy import Seen, UnmaskingPolicy
from rl4dlm.rollout.policies.saving import register

ROTARY_BASE = 10000.0
NORM_EPS = 1e-4


class HiddenStatePolicy(UnmaskingPolicy):
    """A policy whose features are the last hidden states of the canvas's slots, and which draws slots in an order.

    Attributes:
        hidden_size: D, of hidden states.
    """

    hidden_size: int

    def log_factors(self, states: Tensor, order: Tensor, flags: Tensor, time: Tensor) -> Tensor:
        """See `rl4dlm.models.unmasking.choice_scores`, which asks."""
        masked, inside, exists = flags.unbind(-1)
        utilities = self(Seen(states, masked, inside, exists, time))
        return plackett_luce.log_factors(utilities, masked & inside, order - 1)


@register
class LinearPolicy(HiddenStatePolicy):
    """h_i = w x_i, of the last hidden state x_i of a slot.

    Args:
        hidden_size: D, of hidden states.
    """

    kind = "linear"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = _positive("hidden_size", hidden_size)
        self.weight = nn.Parameter(torch.empty(hidden_size, device="meta"))

    @property
    def settings(self) -> dict[str, Any]:
        return {"hidden_size": self.hidden_size}

    def initialise(self, generator: torch.Generator) -> None:
        """Zeros."""
        self.weight.zero_()

    def forward(self, seen: Seen) -> Tensor:
        # No matrix product, which autocast would round.
        return (seen.features.to(self.weight.dtype) * self.weight).sum(-1)


@register
class UnmaskingPolicyModule(HiddenStatePolicy):
    """LLaDOU's, see the module's docstring.

    Args:
        hidden_size: D, of hidden states. frequencies: of the time embedding, half sines and half cosines.
        layers: transformer blocks. heads: of their attention. intermediate_size: of their feed-forward layers.

    Raises:
        ValueError: a number that is not allowed.
    """

    kind = "upm"

    def __init__(
        self,
        hidden_size: int,
        frequencies: int = 256,
        layers: int = 1,
        heads: int = 8,
        intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.heads = _positive("hidden_size", hidden_size), _positive("heads", heads)
        self.frequencies = _positive("frequencies", frequencies)
        self.intermediate_size = _positive(
            "intermediate_size", 4 * hidden_size if intermediate_size is None else intermediate_size
        )
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
            raise ValueError(f"layers={layers!r} is not allowed; it must be an integer, 0 or larger")
        if frequencies % 2:
            raise ValueError(f"frequencies={frequencies} is not allowed; it must be even")
        if layers and hidden_size % (2 * heads):
            raise ValueError(
                f"heads={heads} is not allowed with hidden_size={hidden_size}; it must give heads of an even size"
            )
        with torch.device("meta"):
            self.time_in, self.time_out = nn.Linear(frequencies, hidden_size), nn.Linear(hidden_size, hidden_size)
            self.is_masked, self.is_inside = nn.Embedding(2, hidden_size), nn.Embedding(2, hidden_size)
            self.before, self.behind = AdaptiveNorm(hidden_size), AdaptiveNorm(hidden_size)
            self.blocks = nn.ModuleList(Block(hidden_size, self.heads, self.intermediate_size) for _ in range(layers))
            self.utility = nn.Linear(hidden_size, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "frequencies": self.frequencies,
            "layers": len(self.blocks),
            "heads": self.heads,
            "intermediate_size": self.intermediate_size,
        }

    def initialise(self, generator: torch.Generator) -> None:
        """Random, but for what comes last: modulations, outputs of blocks and utilities are 0, norms are 1."""
        for name, weight in self.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            elif weight.dim() < 2 or any(part in name for part in ("modulation", "output", "utility")):
                weight.zero_()
            else:
                std = 0.02 if name.startswith("is_") else weight.shape[-1] ** -0.5
                weight.normal_(std=std, generator=generator)

    def forward(self, seen: Seen) -> Tensor:
        with torch.autocast(seen.features.device.type, enabled=False):
            x = seen.features.to(self.utility.weight.dtype)
            known = self._time(seen.time)[:, None] + self.is_masked(seen.masked.long())
            known = known + self.is_inside(seen.inside.long())
            x = self.before(x, known)
            for block in self.blocks:
                x = block(x, seen.exists)
            utilities: Tensor = self.utility(self.behind(x, known)).squeeze(-1)
        return utilities

    def _time(self, time: Tensor) -> Tensor:
        """`[R, D]`."""
        half = self.frequencies // 2
        places = torch.arange(half, dtype=torch.float32, device=time.device)
        angles = time.float()[:, None] * torch.exp(-math.log(10000) * places / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.time_in.weight.dtype)
        found: Tensor = self.time_out(functional.silu(self.time_in(waves)))
        return found


class AdaptiveNorm(nn.Module):
    """A layer norm whose scale and shift are linear in what is known of a slot."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(size, 2 * size)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        scale, shift = self.modulation(known).chunk(2, dim=-1)
        return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block in which all slots that there are see each other."""

    def __init__(self, size: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.RMSNorm(size, eps=1e-5), nn.RMSNorm(size, eps=1e-5)
        self.inputs = nn.Linear(size, 3 * size, bias=False)
        self.attention_output = nn.Linear(size, size, bias=False)
        self.gates = nn.Linear(size, 2 * intermediate_size, bias=False)
        self.feed_output = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        heads = self.inputs(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotated(heads[0]), _rotated(heads[1])  # [R, heads, W, d]
        found = functional.scaled_dot_product_attention(query, key, heads[2], attn_mask=exists[:, None, None])
        x = x + self.attention_output(found.transpose(1, 2).flatten(2))
        gate, value = self.gates(self.feed_norm(x)).chunk(2, dim=-1)
        return x + self.feed_output(functional.silu(gate) * value)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions, `[R, heads, W, d]`."""
    half = x.shape[-1] // 2
    speeds = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = torch.arange(x.shape[2], dtype=torch.float32, device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, 1 or larger")
    return value
