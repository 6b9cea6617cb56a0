"""Learning unmasking policies (Jazbec et al., arXiv 2512.09106): which slots to write now, beside a frozen model.

A small network sees how probable the candidate of each open slot is, and the time; each slot is written with a
probability of its own, and at least the one that is wanted most (`rl4dlm.rollout.policies.bernoulli`). Tokens are the
most probable ones, so that the completions of a prompt differ by the policy's draws alone. With r whether a completion
is right, f its steps, L its slots and A = R - mean of the group's R,

    R = r ((L - f + 1) / L)^alpha,
    loss = mean over completions of the mean over steps of  -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A),

rho being the ratio of a step's choice; a batch is used for mu passes. `alpha` says what speed is worth.

Different from a public fork of the paper's code:
- The density of a step knows that a slot is written anyway where nothing was drawn.
- Expert steering, which has some completions of a group decoded by a confidence threshold, is left out.
- The network's rotary positions, its time and the log-odds beside probabilities are our choice. It sees the open slots
  of the active block; slots are written in one block unless `block_length` says otherwise.
- Evaluation is greedy here (`policy_temperature=0`): slots with a probability above 1/2, or the one wanted most; there,
  slots are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.rollout.policies.bernoulli import BernoulliPolicy, entropy, log_probability
from rl4dlm.rollout.policies.policy import UnmaskingPolicy, fresh
from rl4dlm.rollout.schedules.bernoulli import utilities_of
from rl4dlm.training.frozen_model import FrozenModelConfig, FrozenModelTrainer


@dataclass
class BernoulliUnmaskingConfig(FrozenModelConfig):
    """Settings of Bernoulli unmasking; the defaults are those of the code.

    Args:
        policy_hidden_size: D of a new network. policy_heads: of its attention.
        temperature: of tokens; 0: the most probable ones.
        num_generations: G, completions of a prompt. num_iterations: mu, passes over a batch.
        learning_rate, lr_scheduler_type, warmup_steps, weight_decay: of AdamW.
        epsilon: clip range of the ratio of a step. scale_rewards: `"none"`: A is not divided by a deviation.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    own_schedule: ClassVar[str] = "bernoulli"

    policy_hidden_size: int = field(default=128, metadata={"help": "Width of a new policy's network."})
    policy_heads: int = field(default=2, metadata={"help": "Attention heads of a new policy's network."})
    schedule: str = field(default="bernoulli", metadata={"help": "The schedule that asks the policy: bernoulli."})
    temperature: float = field(default=0.0, metadata={"help": "Of tokens; 0: the most probable ones are written."})
    num_generations: int | None = field(default=8, metadata={"help": "Completions of a prompt (G)."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Completions per process and pass."})
    num_iterations: int = field(default=2, metadata={"help": "Passes over a batch of completions (mu)."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of AdamW, the paper's."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=100, metadata={"help": "Optimizer steps over which it rises."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of AdamW."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio of a step's choice."})
    scale_rewards: str = field(
        default="none", metadata={"help": "Divide advantages by a standard deviation: none, group or batch."}
    )

    def __post_init__(self) -> None:
        BernoulliPolicy(hidden_size=self.policy_hidden_size, heads=self.policy_heads)
        super().__post_init__()


class BernoulliUnmaskingTrainer(FrozenModelTrainer):
    """Bernoulli unmasking in TRL's GRPO loop; `BernoulliUnmaskingConfig` has its settings, the module's docstring the
    algorithm."""

    config_class = BernoulliUnmaskingConfig
    args: BernoulliUnmaskingConfig
    policy: BernoulliPolicy
    _tag_names = ["trl", "rl4dlm", "bernoulli-unmasking"]  # noqa: RUF012  (TRL's own form)
    _name = "Bernoulli unmasking"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Learning Unmasking Policies for Diffusion Language Models",
        "id": "2512.09106",
    }

    def build_policy(self) -> BernoulliPolicy:
        """One that writes each open slot with probability 0.12."""
        policy = BernoulliPolicy(hidden_size=self.args.policy_hidden_size, heads=self.args.policy_heads)
        return fresh(policy, seed=self.args.seed, dtype=torch.float64)

    def check_policy(self, policy: UnmaskingPolicy) -> None:
        """It has to be of this kind; its sizes are its own."""
        if not isinstance(policy, BernoulliPolicy):
            raise ValueError(f"{self.first_policy} is of kind {policy.kind!r}, not 'bernoulli'; start from another one")
        self.check_sizes(policy, hidden_size="policy_hidden_size", heads="policy_heads")

    def choices(self, features: Tensor, allowed: Tensor, chosen: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Of sets of slots, `[n, L]`; the entropy is that of the draws."""
        utilities: Any = utilities_of(self.policy, features, allowed, time) / self.args.policy_temperature
        return log_probability(utilities, allowed, chosen), entropy(utilities, allowed)
