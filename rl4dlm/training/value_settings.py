"""Settings of a value model, which trajectory algorithms may have, and what of them goes together.

Owns validation. Values, advantages and losses are `rl4dlm.training.value`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.config import DiffusionPolicyConfig

VALUE_MODELS = ("none", "steps", "blocks")
VALUE_TARGETS = ("reward", "advantage")
VALUE_REWARDS = ("end", "revealed")
VALUED_STEPS = ("all", "block_slices", "segments")
"""Choices of steps that leave none out: the value of a step is about all that come after it."""


@dataclass
class ValueConfig(DiffusionPolicyConfig):
    """Settings of a value model; without one they are to be left alone.

    Args:
        value_model: whether there is one, and what has a value: the state before each of the `"steps"` that are
            scored, or that before each of the `"blocks"` of the canvas. The advantages of steps or blocks are then
            those of generalised advantage estimation, and the algorithm's own are not used.
        value_learning_rate: of the head, which is a group of its own in the optimizer. The paper's 5e-6 is that of a
            whole network, and moves one layer too slowly.
        value_clip: how far a value may go from that of the policy that wrote the completions before its loss stops
            falling; None: no limit.
        value_loss_weight: of the value loss beside the policy's.
        value_trains_trunk: whether gradients of the value loss reach the model itself; if not, the head alone learns.
        value_target: what is to come: the weighted `"reward"`, or the `"advantage"` that a completion would have had
            without a value model, as in TraceRL's code.
        value_rewards: where in a completion that is earned: at its `"end"`, or, step by step or block by block, in
            proportion to the tokens that were `"revealed"`, so that late ones count for less of it.
        gae_lambda: 1: advantages are what was earned from here on less the value, unbiased whatever the values are;
            0: what is earned at once and the value of the next state. gae_gamma: what is earned a step later counts
            so much less.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    value_model: str = field(
        default="none", metadata={"help": "What has a learnt value.", "choices": list(VALUE_MODELS)}
    )
    value_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the value head."})
    value_clip: float | None = field(
        default=0.2, metadata={"help": "Clip range of values around those of the old policy; None is off."}
    )
    value_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    value_trains_trunk: bool = field(
        default=False, metadata={"help": "Let gradients of the value loss reach the model, not the head alone."}
    )
    value_target: str = field(
        default="reward",
        metadata={"help": "What values are of: reward or advantage.", "choices": list(VALUE_TARGETS)},
    )
    value_rewards: str = field(
        default="end",
        metadata={"help": "Where in a completion rewards are earned: end or revealed.", "choices": list(VALUE_REWARDS)},
    )
    gae_lambda: float = field(default=1.0, metadata={"help": "Lambda of generalised advantage estimation."})
    gae_gamma: float = field(default=1.0, metadata={"help": "Discount per step or block."})


def check_value(config: Any) -> None:
    """Raises ValueError for settings of a value model that are not allowed, or that would do nothing."""
    check_choice("value_model", config.value_model, VALUE_MODELS)
    check_choice("value_target", config.value_target, VALUE_TARGETS)
    check_choice("value_rewards", config.value_rewards, VALUE_REWARDS)
    if config.value_model == "none":
        for entry in fields(ValueConfig):
            own = entry.name.startswith(("value_", "gae_"))
            if own and getattr(config, entry.name) != entry.default:
                raise ValueError(
                    f"{entry.name}={getattr(config, entry.name)!r} has no effect with value_model='none'; set "
                    "value_model to steps or blocks, or leave it out"
                )
        return
    for name in ("gae_lambda", "gae_gamma"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)} is not allowed; it must be in [0, 1]")
    for name in ("value_learning_rate", "value_loss_weight", "value_clip"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not allowed; it must be larger than 0")
    if config.steps not in VALUED_STEPS:
        raise ValueError(
            f"value_model={config.value_model!r} is not allowed with steps={config.steps!r}: the value of a step is "
            f"about all that follow it; allowed: {', '.join(VALUED_STEPS)}"
        )
    if config.ratio_unit == "sequence":
        raise ValueError(
            f"value_model={config.value_model!r} is not allowed with ratio_unit='sequence', since steps have "
            "advantages of their own; allowed: token, step"
        )
    if config.old_policy != "rescored" and config.value_clip is not None:
        raise ValueError(
            f"value_clip={config.value_clip} is not allowed with old_policy={config.old_policy!r}, where values of "
            "the old policy are not computed; set value_clip to None, or old_policy to rescored"
        )
    if config.value_target == "advantage" and config.negative_advantage_weight != 1:
        raise ValueError(
            f"negative_advantage_weight={config.negative_advantage_weight} is not allowed with "
            "value_target='advantage', which would be weighed before and after; set value_target to reward"
        )
    if config.fp16:
        raise ValueError(
            f"fp16=True is not allowed with value_model={config.value_model!r}, whose gradients are clipped by "
            "themselves; set bf16=True"
        )
