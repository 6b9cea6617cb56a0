"""A learned order: an unmasking policy that reads hidden states draws which slots a step writes (LLaDOU, DCoLT).

As many slots as an even schedule would write are drawn without replacement, in proportion to the exponentials of the
policy's utilities (Plackett-Luce; Huang et al., arXiv 2505.10446); tokens are drawn independently of that. Since
tokens that are not written play no part, the log-probability of a step is that of the order and of what is written: an
exact density, unlike that of confidence decoding. At temperature 0 the slots of largest utility are written.

`Trace.selection_log_prob` has the order's part, `Trace.commit_rank` the order itself. The policy is that of the model
(`rl4dlm.rollout.policies`); `LLaDOUTrainer` trains one. Every step feeds the whole row, since the policy reads the
states of all slots of the canvas.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.policies import plackett_luce
from rl4dlm.rollout.policies.hidden_states import HiddenStatePolicy
from rl4dlm.rollout.policies.policy import Seen, UnmaskingPolicy
from rl4dlm.rollout.policies.saving import POLICY_FILE, load_policy, policy_of
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, even_counts
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class LearnedOrderArguments:
    """Settings of `learned_order`.

    Args:
        policy: a policy that reads hidden states, the path of a saved one, or None: that of the model, on it or in the
            folder that it was loaded from.
        greedy: whether the slots of largest utility are written, or slots are drawn; None: at temperature 0 the former.
    """

    policy: Any = None
    greedy: bool | None = None

    def __post_init__(self) -> None:
        if self.policy is not None and not isinstance(self.policy, str | os.PathLike | UnmaskingPolicy):
            raise ValueError(
                f"policy={self.policy!r} is not allowed; it must be a path, a policy that reads hidden states, or None"
            )
        if self.greedy not in (None, True, False):
            raise ValueError(f"greedy={self.greedy!r} is not allowed; it must be true, false or None")


@register("learned_order", LearnedOrderArguments, fixed_forwards=True)
def learned_order(arguments: LearnedOrderArguments, config: Any) -> Schedule:
    """Commits slots that a policy over hidden states draws, an even number at each step."""
    if config.cfg_scale:
        raise ValueError(
            f"cfg_scale={config.cfg_scale} is not supported for schedule='learned_order', whose policy has no states "
            "under guidance; it must be 0"
        )
    policy = arguments.policy
    if isinstance(policy, str | os.PathLike):
        policy = load_policy(policy)
    greedy = config.temperature == 0 if arguments.greedy is None else arguments.greedy
    rule = LearnedOrder(config.steps_per_block, config.num_blocks, greedy, policy)
    return Schedule(
        fixed_blocks(config),
        rule.utilities,
        rule.commit,
        reads_states=True,
        draws_positions=not greedy,
        check=rule.check,
    )


@dataclass
class LearnedOrder:
    """The parts that ask a policy.

    Args:
        steps: of a block. blocks: of the canvas. greedy: whether nothing is drawn.
        policy: the one that is asked; None: the model's, which `check` finds.
    """

    steps: int
    blocks: int
    greedy: bool
    policy: Any = None
    found: HiddenStatePolicy | None = field(default=None, init=False)

    def check(self, model: Any) -> None:
        """Finds the policy. ValueError if there is none, or none that reads hidden states of the model's size."""
        policy = policy_of(model) if self.policy is None else self.policy
        if policy is None:
            raise ValueError(
                "schedule='learned_order' needs an unmasking policy: there is none on the model, and no "
                f"{POLICY_FILE} in the folder that it was loaded from; give schedule_args policy=<path>"
            )
        if not isinstance(policy, HiddenStatePolicy):
            raise ValueError(
                f"schedule='learned_order' needs a policy that reads hidden states; the model's is of kind "
                f"{policy.kind!r}"
            )
        size = model.config.get_text_config().hidden_size
        if policy.hidden_size != size:
            raise ValueError(
                f"the unmasking policy reads hidden states of {policy.hidden_size} numbers; those of the model have "
                f"{size}"
            )
        self.found = policy.to(model.device)

    def utilities(self, step: Step) -> Tensor:
        """`[R, W]`, of all slots; those that may not be written mean nothing."""
        assert self.found is not None
        exists = step.offsets < step.length[:, None]
        time = step.total_step.float() / (self.steps * self.blocks)
        utilities: Tensor = self.found(Seen(step.read["states"], step.masked, step.inside, exists, time))
        if bool((utilities.isnan() & step.eligible).any()):
            raise ValueError("the unmasking policy's utilities are not numbers (NaN); decoding cannot go on")
        return utilities

    def commit(self, step: Step, scores: Tensor) -> Tensor:
        """An even number of slots, drawn or the best ones; tokens that are deferred come last."""
        counts = even_counts(step.masked_at_start, self.steps, step.step)
        utilities = scores.clamp(min=torch.finfo(scores.dtype).min / 4)
        if self.greedy:
            step.order = plackett_luce.greedy(utilities, step.eligible, counts)
        else:
            uniforms = step.uniform("unmasking order", step.eligible)
            step.order = plackett_luce.draw(utilities, step.eligible, counts, uniforms)
            density = plackett_luce.log_density(utilities, step.eligible, step.order)
            step.selection_log_prob += density.to(step.selection_log_prob)
        return step.order >= 0
