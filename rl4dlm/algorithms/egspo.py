"""EGSPO and EGSPO-SA (arXiv 2603.12554): the steps at which the model was least sure, with advantages of their own.

Of each completion the K steps are scored whose tokens were drawn from distributions of the largest mean entropy. With
ell_k the sum of the log-probabilities of step k's tokens in the state before it, rho_k = exp(ell_k - ell_k of the old
policy), n_k the number of its tokens, R the reward and r_k that of the state before the step with every open slot
filled by its most probable token,

    a_k  = (R + lambda (R - r_k)) / (1 + lambda),        A_k = a_k less its mean over the group, step by step,
    loss = mean over completions and their K steps of  [-min(rho_k A_k, clip(rho_k) A_k) + beta KL_k] / n_k,

with KL_k = exp(-d) + d - 1 and d = ell_k - ell_k of the reference. lambda = 0 is EGSPO, where every step has the
advantage of its completion; the paper's lambda for EGSPO-SA is 0.5. That baseline costs K more calls of the reward
functions per
completion, and keeps no gradient from being the plain one: lambda / (1 + lambda) weighs a control variate that was
known before the step (enumerated in `tests/likelihood/test_step_gradients.py`).

Decided here, and where the released code is different:
- `steps="top_entropy"`, the paper's, is decided by later steps, too, so that what it leaves is no policy gradient: even
  a constant reward has one, which the group's mean takes away. `"entropy_threshold"` (above a running quantile that
  keeps K steps on average) and `"sampled"` with `step_proposal="entropy"` (weights that make it unbiased) do without.
- The mean over the group is of the k-th of each completion's chosen steps in the order of time; in the code of the k-th
  largest entropy. Either compares different times. `step_baseline="reward"` centres R alone and adds lambda (R - r_k)
  as it is.
- The code makes K micro-steps of a batch, each on one step of every completion, and an optimizer step after every
  other; here each pass is over all K. `num_iterations` repeats it.
- Its old policy is what was recorded while decoding, in the precision of the model (`old_policy="recorded"`); here it
  is scored in the same views, so that ratios start at 1.
- Filling every open slot fills later blocks, too: r_k of early steps is low for their sake.
- Padding is hidden; tokens behind the end are not scored; a KL term over the whole vocabulary is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.likelihood.steps import Steps
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import AGGREGATIONS, KL_UNITS, RATIO_UNITS, STEPS, TrajectoryConfig

CHOICES = ("top_entropy", "entropy_threshold", "sampled")
STEP_BASELINES = ("return", "reward")


@dataclass
class EGSPOConfig(TrajectoryConfig):
    """Settings of EGSPO; the defaults are those of the released runs.

    Args:
        steps: `"top_entropy"`, `"entropy_threshold"` or `"sampled"`. num_scored_steps: K.
        step_lambda: lambda; 0 is EGSPO, above 0 EGSPO-SA, for which rollouts record what they would complete to.
        step_baseline: what is centred over the group: the `"return"` a_k, or the `"reward"` R alone.
        num_generations: G, completions of a prompt.
        learning_rate: of AdamW.
        temperature: of the rollout; scores are computed at `score_temperature` 1.
        epsilon, epsilon_high: clip range of a step's ratio. beta: weight of its KL term.
        scale_rewards: `"none"`: advantages are not divided by a standard deviation.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    steps: str = field(
        default="top_entropy", metadata={"help": "Recorded steps that are scored.", "choices": list(STEPS)}
    )
    num_scored_steps: int | None = field(default=8, metadata={"help": "How many steps of a completion are scored (K)."})
    step_lambda: float = field(
        default=0.0, metadata={"help": "Weight of a step's own advantage: 0 is EGSPO, the paper's 0.5 EGSPO-SA."}
    )
    step_baseline: str = field(
        default="return",
        metadata={"help": "What is centred over the group: return or reward.", "choices": list(STEP_BASELINES)},
    )
    num_generations: int | None = field(default=8, metadata={"help": "Completions of a prompt (G), the paper's 8."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of AdamW, the paper's."})
    temperature: float = field(default=0.9, metadata={"help": "Temperature of the rollout."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio of a step."})
    epsilon_high: float | None = field(default=0.5, metadata={"help": "Upper clip range of the ratio of a step."})
    beta: float = field(default=0.04, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    ratio_unit: str = field(
        default="step", metadata={"help": "What has a policy ratio of its own.", "choices": list(RATIO_UNITS)}
    )
    kl_unit: str = field(
        default="step", metadata={"help": "Whether the KL term is of tokens or steps.", "choices": list(KL_UNITS)}
    )
    aggregation: str = field(
        default="steps",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )

    def __post_init__(self) -> None:
        check_choice("steps", self.steps, CHOICES)
        check_choice("step_baseline", self.step_baseline, STEP_BASELINES)
        if not 0 <= self.step_lambda < float("inf"):
            raise ValueError(f"step_lambda={self.step_lambda} is not allowed; it must be 0 or larger")
        if not self.step_lambda and self.step_baseline != "return":
            raise ValueError(
                f"step_baseline={self.step_baseline!r} has no effect with step_lambda=0; set one of them otherwise"
            )
        if self.step_lambda and self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not allowed with step_lambda={self.step_lambda}: advantages "
                "of steps are not scaled; allowed: none"
            )
        if not self.beta:
            self.kl_unit = "token"  # there is no KL term, and nothing reads it
        super().__post_init__()

    def recorded(self) -> tuple[str, ...]:
        """What states would have been completed to, where steps have advantages of their own."""
        return ("entropy", "predictions") if self.step_lambda else ("entropy",)


class EGSPOTrainer(TrajectoryTrainer):
    """EGSPO in TRL's GRPO loop; `EGSPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = EGSPOConfig
    args: EGSPOConfig
    _tag_names = ["trl", "rl4dlm", "egspo"]  # noqa: RUF012  (TRL's own form)
    _name = "EGSPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection and Stepwise Advantages",
        "id": "2603.12554",
    }

    def step_rewards(self, rollout: Rollout, steps: Steps) -> Tensor | None:
        """Rewards of what the state before each step would have been completed to at once."""
        if not self.args.step_lambda:
            return None
        found = rollout.canvas[:, None].repeat(1, steps.first.shape[1], 1)
        for step in steps.first[steps.last >= steps.first].unique().tolist():
            completed = rollout.completion_at(step)[:, None].to(found)
            found = torch.where((steps.first == step)[..., None].to(found.device), completed, found)
        return self.rewards_of_canvases(rollout, found)

    def step_advantages(self, rewards: Tensor, step_rewards: Tensor | None, batch: dict[str, Any]) -> Tensor | None:
        """The module's A_k; means are over the completions of a group that have a k-th step."""
        if step_rewards is None:
            return None
        share, reward = self.args.step_lambda, rewards[..., None].to(step_rewards)
        gain = share * (reward - step_rewards)
        if self.args.step_baseline == "reward":
            return (reward - reward.nanmean(1, keepdim=True) + gain) / (1 + share)
        returns = (reward + gain) / (1 + share)
        return returns - returns.nanmean(1, keepdim=True)
