"""AGRPO (arXiv 2510.04019): GRPO on a few recorded steps, sampled so that the gradient of all of them is unbiased.

Of the S_j steps of completion j that wrote tokens to be scored, K are drawn; with q_s the probability of a step, U_s
the tokens that it wrote, rho_i their ratios in the state before it and A = r - mean of the group's r, the loss is

    mean over completions of  sum over drawn s of  1 / (K q_s)  sum over i in U_s of  -min(rho_i A, clip(rho_i) A).

q is 1 / S_j (`step_proposal="uniform"`) or in proportion to the mean entropy of what the step wrote (`"entropy"`). The
numbers that steps are drawn by are spread over a completion and over completions by their ids; each pass draws anew.

Different from the released code:
- It estimates the mean over the steps of a completion, without the factor S_j, so that a step of a long completion
  counts less: `step_scale="mean"`. The sum, the default, is the gradient of the trajectory's log-likelihood.
- Its old log-probabilities are those recorded while decoding: `old_policy="recorded"`. The default scores the old
  policy in the same views, where more than one step of the optimizer is taken on a batch.
- Its scores are of the filtered distribution that was drawn from, from a stored mask of the vocabulary for each token;
  here they are of the whole softmax (at `score_temperature`).
- It draws from the steps up to the last that wrote something else than an end of sequence; here from those that wrote
  a token up to the first end, the decision to stop included.
- Steps are spread over rows by their ids, not by their place in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import AGGREGATIONS, STEPS, TrajectoryConfig


@dataclass
class AGRPOConfig(TrajectoryConfig):
    """Settings of AGRPO. Those of the paper's runs are not in the code that was read; K, epsilon and beta are ours.

    Args:
        steps: `"sampled"`. num_scored_steps: K, steps of a completion that are scored in each pass.
        scale_rewards: `"none"`: advantages are not divided by the group's standard deviation.
        beta: weight of the KL term, k3 to the reference times the policy ratio (`use_bias_correction_kl`) in the code.
        aggregation: `"row_sums"`: the sum over the tokens of a completion.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    steps: str = field(default="sampled", metadata={"help": "Recorded steps that are scored.", "choices": list(STEPS)})
    num_scored_steps: int | None = field(default=8, metadata={"help": "How many steps of a completion are drawn (K)."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    aggregation: str = field(
        default="row_sums",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )

    def __post_init__(self) -> None:
        if self.steps != "sampled":
            raise ValueError(f"steps={self.steps!r} is not allowed; AGRPO draws them: sampled")
        super().__post_init__()


class AGRPOTrainer(TrajectoryTrainer):
    """AGRPO in TRL's GRPO loop; `AGRPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = AGRPOConfig
    args: AGRPOConfig
    _tag_names = ["trl", "rl4dlm", "agrpo"]  # noqa: RUF012  (TRL's own form)
    _name = "AGRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Principled and Tractable RL for Reasoning with Diffusion Language Models",
        "id": "2510.04019",
    }
