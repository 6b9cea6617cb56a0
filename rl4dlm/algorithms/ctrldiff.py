"""CtrlDiff's block sizes (Huang and Tang, arXiv 2505.14455), learnt beside a frozen model.

The schedule `ctrldiff` asks a policy how long the next block is, which then is written by a confidence threshold. With
r the reward of a completion and f its forwards of at most L, the slots of the canvas, A = R - mean of the group's R,
and pi(a_b) the probability of the size that was drawn for block b,

    R = r - alpha f / L,
    loss = mean over completions of the sum over blocks of  -min(rho A, clip(rho) A) - policy_entropy * H(pi),

whose gradient is REINFORCE's with the group's mean for a baseline as long as the policy is the one that drew the sizes
(`num_iterations=1`, where rho = pi / pi_old = 1). Sizes are discrete and what the policy sees does not depend on it, so
that the log-probabilities are exact.

No code was published, and reward, sizes, network, optimizer and results could not be read: all of this is our own
definition of what the paper describes. There the policy sees pooled hidden states and entropies of the blocks before;
here it sees probabilities and entropies of the candidates ahead. The classifier that guides tokens is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.policies.block_sizes import LearnedSizes, offered
from rl4dlm.rollout.policies.policy import UnmaskingPolicy, fresh
from rl4dlm.training.frozen_model import FrozenModelConfig, FrozenModelTrainer


@dataclass
class CtrlDiffConfig(FrozenModelConfig):
    """Settings of CtrlDiff; all of them are ours.

    Args:
        block_sizes: sizes that a new policy chooses from, ascending. policy_hidden_size: units of its hidden layer.
        speed: `"additive"`: R = r - alpha f / L. speed_alpha: alpha.
        step_average: `"sum"`, over the blocks of a completion.
        policy_entropy: weight of the entropy of the sizes' distribution.
        num_generations: G, completions of a prompt. num_iterations: passes over a batch.
        scale_rewards: `"none"`: A is not divided by a deviation.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    own_schedule: ClassVar[str] = "ctrldiff"
    own_arguments: ClassVar[tuple[str, ...]] = (*FrozenModelConfig.own_arguments, "sizes")

    block_sizes: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Block sizes that a new policy chooses from."}
    )
    policy_hidden_size: int = field(default=32, metadata={"help": "Units of a new policy's hidden layer."})
    schedule: str = field(default="ctrldiff", metadata={"help": "The schedule that asks the policy: ctrldiff."})
    speed: str = field(
        default="additive", metadata={"help": "How forwards count in the reward: product, additive or none."}
    )
    step_average: str = field(default="sum", metadata={"help": "How losses of blocks are put together: sum or mean."})
    policy_entropy: float = field(default=0.01, metadata={"help": "Weight of the entropy of the sizes' distribution."})
    num_generations: int | None = field(default=8, metadata={"help": "Completions of a prompt (G)."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a batch of completions."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of AdamW."})
    scale_rewards: str = field(
        default="none", metadata={"help": "Divide advantages by a standard deviation: none, group or batch."}
    )

    def __post_init__(self) -> None:
        LearnedSizes(tuple(self.block_sizes), hidden=self.policy_hidden_size)
        super().__post_init__()
        assert self.max_completion_length is not None
        if sum(size <= self.max_completion_length for size in self.block_sizes) < 2:
            raise ValueError(
                f"block_sizes={self.block_sizes} is not allowed with max_completion_length="
                f"{self.max_completion_length}: there is nothing to choose; two sizes at least must fit"
            )

    def arguments(self) -> dict[str, Any]:
        """With the sizes, until there is a policy that has them."""
        return {**super().arguments(), "sizes": tuple(self.block_sizes)}


class CtrlDiffTrainer(FrozenModelTrainer):
    """CtrlDiff in TRL's GRPO loop; `CtrlDiffConfig` has its settings, the module's docstring the algorithm."""

    config_class = CtrlDiffConfig
    args: CtrlDiffConfig
    policy: LearnedSizes
    _tag_names = ["trl", "rl4dlm", "ctrldiff"]  # noqa: RUF012  (TRL's own form)
    _name = "CtrlDiff"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "CtrlDiff: Boosting Large Diffusion Language Models with Dynamic Block Prediction and Controllable "
        "Generation",
        "id": "2505.14455",
    }

    def build_policy(self) -> LearnedSizes:
        """One to which all sizes are equally likely."""
        policy = LearnedSizes(tuple(self.args.block_sizes), hidden=self.args.policy_hidden_size)
        return fresh(policy, seed=self.args.seed, dtype=torch.float64)

    def check_policy(self, policy: UnmaskingPolicy) -> None:
        """It has to choose among the sizes of the settings."""
        if not isinstance(policy, LearnedSizes):
            raise ValueError(
                f"{self.first_policy} is of kind {policy.kind!r}, not 'block_sizes'; start from another one"
            )
        if list(policy.sizes) != list(self.args.block_sizes):
            raise ValueError(
                f"{self.first_policy} chooses among {list(policy.sizes)}, but block_sizes={self.args.block_sizes}"
            )
        self.check_sizes(policy, hidden="policy_hidden_size")

    def _decided_by(self, decoding: DecodingConfig, policy: Any, **arguments: Any) -> DecodingConfig:
        return super()._decided_by(decoding, policy, **{"sizes": None, **arguments})

    def choices(self, features: Tensor, allowed: Tensor, chosen: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Of sizes, `[n, K]`."""
        log_probs = offered(self.policy.log_probs(features), allowed, self.args.policy_temperature)
        drawn = torch.where(chosen, log_probs, 0.0).sum(-1)
        each = torch.where(allowed, log_probs.exp() * torch.where(allowed, log_probs, 0.0), 0.0)
        return drawn, -each.sum(-1)
