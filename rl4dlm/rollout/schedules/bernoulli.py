"""A learned policy decides of each open slot apart whether it is written now (Jazbec et al., arXiv 2512.09106).

Of a block's open slots the policy sees how probable their candidates are; which of them are written is drawn, and the
slot that it wants most is written where nothing was drawn. `BernoulliUnmaskingTrainer` trains one beside a frozen
model, from what `record=("policy",)` keeps: the probabilities, the open slots, and which of them were written.

Differences from a public fork of the paper's code: the density of a step knows that a slot is written anyway where
nothing was drawn; the policy looks at the open slots of the active block and is not told of those behind it; time is
the number of steps over that of slots; any temperature of tokens, where the policy sees the probability of the
candidate that was drawn, which at temperature 0 is the largest, as in the paper.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.policies.bernoulli import BernoulliPolicy, choose, log_probability
from rl4dlm.rollout.policies.policy import Seen
from rl4dlm.rollout.policies.saving import load_policy, policy_of
from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class BernoulliArguments:
    """Settings of `bernoulli`.

    Args:
        policy: a `BernoulliPolicy`, the path of a saved one or of the folder it is in, or None: the one of the model.
        policy_temperature: T, of the draws; 0: nothing is drawn, and the slots are written that would be with a
            probability above 1/2, or the one that is wanted most.
    """

    policy: Any = None
    policy_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "policy_temperature", 0)

    @cached_property
    def chosen(self) -> BernoulliPolicy | None:
        """The policy as an object; None: that of the model."""
        return _checked(load_policy(self.policy) if isinstance(self.policy, str | os.PathLike) else self.policy)


@register("bernoulli", BernoulliArguments, takes_steps=False)
def bernoulli(arguments: BernoulliArguments, config: Any) -> Schedule:
    """Writes the slots of the block that the policy draws, each apart, and at least the one that it wants most."""
    decider = Decider(arguments.policy_temperature, arguments.chosen)
    return Schedule(
        fixed_blocks(config), probability, decider.commit, draws_positions=True, policy=decider, check=decider.find
    )


@dataclass
class Decider:
    """The policy at work; it may be found on the model, once that is known."""

    temperature: float
    policy: BernoulliPolicy | None

    def find(self, model: Any) -> None:
        """Takes the policy of the model where there is none. ValueError where that has none either, or another one."""
        if self.policy is None:
            self.policy = _checked(policy_of(model))
        if self.policy is None:
            raise ValueError(
                "schedule='bernoulli' needs a policy, and the model has none; give the path of one as policy in "
                "schedule_args (BernoulliUnmaskingTrainer trains one)"
            )

    def commit(self, step: Step, scores: Tensor) -> Tensor:
        """bool `[R, W]`, the slots that are written."""
        assert self.policy is not None
        allowed = step.eligible & (scores > -torch.inf)  # deferred tokens wait until there is nothing else
        allowed = torch.where(allowed.any(-1, keepdim=True), allowed, step.eligible)
        features = torch.where(allowed, step.drawn.confidence, 0.0)
        time = step.total_step.double() / step.length
        utilities = utilities_of(self.policy, features, allowed, time) / (self.temperature or 1.0)
        if bool((utilities.isnan() & allowed).any()):
            raise ValueError("the unmasking policy's utilities are not numbers (NaN); decoding cannot go on")
        uniform = step.uniform("unmask", allowed) if self.temperature else None
        chosen = choose(utilities, allowed, uniform)
        if self.temperature:
            step.selection_log_prob += log_probability(utilities, allowed, chosen).to(step.selection_log_prob)
        step.noted = {"policy_features": features, "policy_allowed": allowed, "policy_chosen": chosen}
        return chosen


def utilities_of(policy: BernoulliPolicy, features: Tensor, allowed: Tensor, time: Tensor) -> Tensor:
    """h `[n, W]` on the device of what is seen: probabilities `[n, W]` of candidates, slots bool `[n, W]` that may be
    written, and times `[n]`."""
    everywhere = torch.ones_like(allowed)
    return policy(Seen(features[..., None], allowed, everywhere, everywhere, time)).to(features.device)


def _checked(policy: Any) -> BernoulliPolicy | None:
    if policy is not None and not isinstance(policy, BernoulliPolicy):
        kind = getattr(policy, "kind", type(policy).__name__)
        raise ValueError(f"schedule='bernoulli' needs a policy of kind 'bernoulli', not {kind!r}")
    return policy
