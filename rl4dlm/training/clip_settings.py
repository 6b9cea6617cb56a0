"""Settings of what policy ratios may do to a loss. The formulas are in `clipping.py`, where they act in `ratios.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.clipping import CLIPS, SELF_NORMALIZE

_OWN_RATIO = ("cispo", "sapo", "vespo")
_IDLE = {"delta": ("unconditional", "none"), "epsilon": ("none",), "epsilon_high": ("none",)}
"""Settings that some clips do not read."""


@dataclass
class ClipSettings:
    """What every RL config whose loss has policy ratios has besides; `epsilon` and `epsilon_high` keep TRL's meaning.

    Args:
        clip: what becomes of a ratio outside of [1 - epsilon, 1 + epsilon_high], whatever it is the ratio of: `"ppo"`,
            the minimum of PPO and GRPO; `"log"`, the same loss from log-ratios, which cannot overflow where it is
            clipped; `"unconditional"`, ratios are constant weights, clipped on both sides whatever the sign of the
            advantage (StableDRL, arXiv 2603.06743): `epsilon=1` is no lower end, `epsilon=1 - 1/c, epsilon_high=c - 1`
            a range from 1/c to c; `"none"`, the ratio as it is.
        self_normalize: divides the weights of an unconditional clip by their mean, over the completions of a
            `"group"` or of a generation batch (`"batch"`), so that a factor that all of them have in common, such as
            an error of the estimate, changes nothing; `"none"`. Where micro-batches do not hold all completions that
            share a mean, the whole generation batch is scored once more before each optimizer step after the first.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    clip: str = field(
        default="ppo",
        metadata={"help": f"What is done with policy ratios: {', '.join(CLIPS)}.", "choices": list(CLIPS)},
    )
    self_normalize: str = field(
        default="none",
        metadata={
            "help": f"What the weights of clip=unconditional are divided by the mean of: {', '.join(SELF_NORMALIZE)}.",
            "choices": list(SELF_NORMALIZE),
        },
    )


def check_clip(config: Any) -> None:
    """Raises ValueError for settings that are not allowed, or that would do nothing."""
    check_choice("clip", config.clip, CLIPS)
    check_choice("self_normalize", config.self_normalize, SELF_NORMALIZE)
    for name in ("epsilon", "epsilon_high"):
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name}={value} is not allowed; it must be 0 or larger")
    if config.clip != "ppo" and config.loss_type in _OWN_RATIO:
        raise ValueError(
            f"clip={config.clip!r} is not allowed with loss_type={config.loss_type!r}, which does something of its own "
            "with policy ratios; set clip to ppo, or choose another loss_type"
        )
    defaults = {entry.name: entry.default for entry in fields(config)}
    for name, clips in _IDLE.items():
        value = getattr(config, name)
        if config.clip in clips and value != defaults[name]:
            raise ValueError(f"{name}={value} has no effect with clip={config.clip!r}; leave it out")
    if config.self_normalize != "none" and config.clip != "unconditional":
        raise ValueError(
            f"self_normalize={config.self_normalize!r} is not allowed with clip={config.clip!r}, whose ratios are no "
            "weights; set clip='unconditional' (with epsilon=1 and epsilon_high=inf if nothing is to be clipped)"
        )
