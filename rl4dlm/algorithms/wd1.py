"""wd1: weighted log-likelihoods of good and bad completions, without policy ratios (arXiv 2507.08838).

With r_i - mean the reward of completion i less its group's mean, softmax over the group, and S(y) the mean-field
score of a completion (all of it hidden, prompt tokens with probability p; summed over the tokens in `scope`),

    w+_i = softmax_i(psi (r_i - mean)),    w-_i = softmax_i(-psi (r_i - mean))
    loss = -sum_i (w+_i - s w-_i) S(y_i)             over a group; the mean over groups.

Only the current policy is scored. The paper derives psi = 1 / (lambda + beta) from penalties towards the old policy and
a reference, and runs with psi = 1 and without a reference, as here. s = 0 leaves the positive part, advantage-weighted
regression (the paper's ablation wd1-P, which learns little).

Decided differently from the released code: the softmax is over complete groups, wherever their completions are, where
the code takes the rows of a device, which are one group with its settings; `weights_over="batch"` is the sum over all
groups of its section 3.2. The loss is the mean over groups, as there; equation 9 divides by the group size, too. Scores
have no dropout, and each pass over a batch its own prompt masks, also when gradients are accumulated.

wd1++, which also learns from predictions at intermediate steps, is not here: no code was released.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.training.advantages import softmax_weights
from rl4dlm.training.losses import weighted_likelihood
from rl4dlm.training.ratio_free import RatioFreeConfig
from rl4dlm.training.setup import mean_field
from rl4dlm.training.trainer import DiffusionPolicyTrainer, PolicyScores

__all__ = ["WD1Config", "WD1Trainer"]


@dataclass
class WD1Config(RatioFreeConfig):
    """Settings of `WD1Trainer`: those of `DiffusionPolicyConfig`, with wd1's own.

    Args:
        psi: factor of advantages in the exponents; larger than 0.
        negative_weight: s, what bad completions count for; 0: nothing.
        weights_over: `"group"`, weights add up to 1 in each group; `"batch"`, on average over groups.
        p_mask_prompt: probability with which a prompt token is hidden.
        num_iterations: passes over a batch of completions (mu), each with prompt masks of its own.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    psi: float = field(default=1.0, metadata={"help": "Factor of advantages in the exponents of weights."})
    negative_weight: float = field(default=1.0, metadata={"help": "What bad completions count for."})
    weights_over: str = field(
        default="group",
        metadata={"help": "Completions that share a softmax: group or batch.", "choices": ["group", "batch"]},
    )
    p_mask_prompt: float = field(
        default=0.15, metadata={"help": "Probability with which a prompt token is hidden when completions are scored."}
    )
    num_iterations: int = field(default=8, metadata={"help": "Passes over a batch of completions (mu)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weights_over", self.weights_over, ("group", "batch"))
        if not self.psi > 0:
            raise ValueError(f"psi={self.psi} is not allowed; it must be larger than 0")
        if self.negative_weight < 0:
            raise ValueError(f"negative_weight={self.negative_weight} is not allowed; it must be 0 or larger")
        MeanField(self.p_mask_prompt, self.scope)

    def refused_settings(self) -> dict[str, str]:
        """Those of policy ratios, KL terms and, since weights are a softmax, scales and normalisations of rewards."""
        return {
            **super().refused_settings(),
            "negative_advantage_weight": "negative_weight says what becomes of completions below the baseline",
            "scale_rewards": "weights are a softmax of rewards; set psi",
            "multi_objective_aggregation": "weights are a softmax of the weighted sum of rewards; set reward_weights",
        }


class WD1Trainer(DiffusionPolicyTrainer):
    """wd1 in TRL's GRPO loop; `WD1Config` has its settings, the module's docstring the algorithm."""

    config_class = WD1Config
    args: WD1Config
    advantages_read_scores = False
    uses_old_policy = False
    _tag_names = ["trl", "rl4dlm", "wd1"]  # noqa: RUF012  (TRL's own form)
    _name = "wd1"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "wd1: Weighted Policy Optimization for Reasoning in Diffusion Language Models",
        "id": "2507.08838",
    }

    def build_estimator(self) -> Estimator:
        """The mean-field estimator of the model's noise, with this run's prompt masking."""
        return mean_field(self.model, self.args.p_mask_prompt, self.args.scope)

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """`w+ - s w-`."""
        return signed_weights(rewards, self.args.psi, self.args.negative_weight, self.args.weights_over)

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor:
        """Those with a weight: where all rewards of a group are equal and s is 1, none has."""
        return self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """Of the completions of a micro-batch, as a mean over groups."""
        self.log_entropy(scores, batch["completion_mask"])
        sequence = (scores.log_probs * batch["completion_mask"]).sum(-1)
        group = self.num_generations if self.model.training else self.num_generations_eval
        return self.mean_over_rows(weighted_likelihood(sequence, batch["advantages"])) * group


def signed_weights(rewards: Tensor, psi: float, negative_weight: float = 1.0, over: str = "group") -> Tensor:
    """`softmax(psi A) - s softmax(-psi A)`, float64 `[N, G]`, for A the rewards less their group's mean.

    Args:
        rewards: `[N, G]`; completions with NaN have weight 0.
        psi, negative_weight, over: as in `WD1Config`.
    """
    exponents = psi * (rewards.double() - rewards.double().nanmean(-1, keepdim=True))
    return softmax_weights(exponents, over) - negative_weight * softmax_weights(-exponents, over)
