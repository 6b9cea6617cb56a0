"""DiffusionGemma's sampler: a canvas of random tokens is refined until it is stable and confident.

At each step the model proposes a token for every position, drawn at a temperature that falls linearly. Proposals are
accepted from the lowest entropy on, as long as the entropies of those before add up to at most a bound, which bounds
the mutual information of what is accepted together (entropy-bounded unmasking, arXiv 2505.24857); all other positions
get new random tokens. Nothing accepted is final. The result is the most probable canvas of the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.parts import CanvasSchedule
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class EntropyBoundCanvasArguments:
    """Settings of `entropy_bound_canvas`; the defaults are those of transformers' generation.

    Args:
        max_steps: N, denoising steps of one canvas at most.
        t_min: with n of N steps left the temperature is `t_min + (temperature - t_min) * n / N`, where `temperature` is
            that of the decoding settings (0.8 in transformers) and at least `t_min`.
        entropy_bound: in nats; `inf` accepts everything.
        stability: steps for which the most probable canvas must have stayed the same before it is finished.
        confidence: mean entropy per token, in nats, below which a finished canvas must be.
    """

    max_steps: int = 48
    t_min: float = 0.4
    entropy_bound: float = 0.1
    stability: int = 1
    confidence: float = 0.005

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("stability", 0)):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, {least} or larger")
        for name in ("t_min", "entropy_bound", "confidence"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value!r} is not allowed; it must be a number larger than 0")


@register("entropy_bound_canvas", EntropyBoundCanvasArguments, takes_steps=False, noise="uniform")
def entropy_bound_canvas(arguments: EntropyBoundCanvasArguments, config: Any) -> CanvasSchedule:
    """Accepts the proposals of lowest entropy and renews all other tokens."""
    without = {
        "top_p": 1.0, "top_k": 0, "cfg_scale": 0.0, "suppress_token_ids": (), "defer_token_ids": (),
        "min_new_tokens": 0, "eos_penalty": 0.0,
    }  # fmt: skip
    for name, off in without.items():
        if getattr(config, name) != off:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no meaning for schedule='entropy_bound_canvas'; allowed: {off!r}"
            )
    if config.cache not in ("none", "auto"):
        raise ValueError(
            f"cache={config.cache!r} has no meaning for schedule='entropy_bound_canvas'; allowed: 'none' and 'auto'"
        )
    if not arguments.t_min <= config.temperature < math.inf:
        raise ValueError(
            f"temperature={config.temperature} is not allowed for schedule='entropy_bound_canvas': it falls from "
            f"there to t_min={arguments.t_min}, so it must be that or larger"
        )

    def temperature(remaining: int) -> float:
        return float(arguments.t_min + (config.temperature - arguments.t_min) * remaining / arguments.max_steps)

    return CanvasSchedule(
        max_steps=arguments.max_steps,
        temperature=temperature,
        accept=lambda entropies: within_entropy_bound(entropies, arguments.entropy_bound),
        stability=arguments.stability,
        confidence=arguments.confidence,
    )


def within_entropy_bound(entropies: Tensor, bound: float) -> Tensor:
    """The positions of lowest entropy, as long as the entropies before each add up to at most `bound`.

    Args:
        entropies: `[R, C]`, in nats. bound: in nats.

    Returns:
        bool `[R, C]`; one position of each row at least, the lower one among equals.
    """
    ordered, order = entropies.sort(dim=-1, stable=True)
    before = torch.nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before <= bound)
