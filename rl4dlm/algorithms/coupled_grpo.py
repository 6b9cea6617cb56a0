"""coupled-GRPO (DiffuCoder: Gong et al., arXiv 2506.20639): GRPO with scores from pairs of complementary views.

The score of a completion token averages its log-probability when the whole completion is hidden, and lambda weighted
ones, each from the one of two complementary views that hides it (section 4, `rl4dlm.likelihood.coupled`). It is no
log-probability: with one pair it is about 1.5 times one, and clip range and KL coefficient are made for that scale.
With rho = exp(s - s_old) the loss per token is that of GRPO,

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta (exp(s_ref - s) - (s_ref - s) - 1),

and A = r - mean of the group's r, or r - mean of the others' r (`baseline="leave_one_out"`).

Where the paper and its released code differ, or both are wrong, this is decided:
- Baseline: the paper's main result has the group's mean, the default here; the code always leaves one out.
- Averages: the paper's is per sequence, then over sequences; the code's over all tokens of a micro-batch
  (`loss_type="bnpo"`). The default here, `"dapo"`, is over all tokens of a generation batch.
- Temperature of the rollout: 1.2 as in the paper; the released settings have 1.0.
- One level for the whole batch, and masks that micro-batches share, in the code; here each row has its own.
- The code's index of the masks counts micro-steps: with 2 passes and 2 micro-batches per step only one of the two sets
  of masks is ever used. Here it counts passes.
- The metrics `kl` and `clip_ratio` of the code multiply each row by the masks of all rows; TRL's are right.
- The code attends to padding when it scores; here padding is hidden. Tokens behind the end are noised and shown in the
  code; here they stay hidden, unless `scope="canvas"`, which also scores them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.training.advantages import BASELINES, above_baseline, check_baseline
from rl4dlm.training.config import check_ratio_level, set_but_not_supported
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer


@dataclass
class CoupledGRPOConfig(DiffusionPolicyConfig):
    """Settings of coupled-GRPO; the defaults are the paper's, but for sizes and optimizer,
    which are TRL's here and the paper's in the configuration files.

    Args:
        pairs: lambda, pairs of complementary views besides the one that hides everything; 0 is diffu-GRPO without
            prompt masking.
        level_range: the share of tokens that the first view of a pair hides is uniform in it.
        baseline: `"group_mean"`, or `"leave_one_out"`, as in the released code.
        num_iterations: mu, passes over a batch of completions.
        epsilon: clip range. beta: weight of the KL term.
        scale_rewards: `"none"`: advantages are not divided by a standard deviation.
        temperature, top_p: of the rollout; scores are computed at `score_temperature` 1.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    pairs: int = field(default=1, metadata={"help": "Pairs of complementary views besides the full one (lambda)."})
    level_range: list[float] = field(
        default_factory=lambda: [0.2, 0.8],
        metadata={"help": "Range of the share of tokens that the first view of a pair hides."},
    )
    baseline: str = field(
        default="group_mean",
        metadata={"help": "What rewards are compared with: group_mean or leave_one_out.", "choices": list(BASELINES)},
    )
    num_iterations: int = field(default=2, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    temperature: float = field(default=1.2, metadata={"help": "Temperature of the rollout."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the rollout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = [] if self.pairs else set_but_not_supported(self, {"level_range": "it has no effect with pairs=0"})
        if refused:
            raise ValueError("; ".join(refused))
        check_ratio_level(self, self.estimator())
        check_baseline(self)

    def estimator(self) -> Coupled:
        """The estimator that these settings describe; ValueError for settings that describe none."""
        return Coupled(self.pairs, tuple(self.level_range), self.scope)  # type: ignore[arg-type]


class CoupledGRPOTrainer(DiffusionPolicyTrainer):
    """coupled-GRPO in TRL's GRPO loop; `CoupledGRPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = CoupledGRPOConfig
    args: CoupledGRPOConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "coupled-grpo"]  # noqa: RUF012  (TRL's own form)
    _name = "coupled-GRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
        "id": "2506.20639",
    }

    def build_estimator(self) -> Estimator:
        """Pairs of complementary views, and one that hides everything."""
        return of_noise(self.model, self.args.estimator())

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Rewards above the baseline."""
        return above_baseline(rewards, self.args.baseline, self.args.scale_rewards)
