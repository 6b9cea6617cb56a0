"""DiPO (DiRL: arXiv 2512.22234): GRPO on the exact steps of a model that denoises block by block.

Each token is scored in the state of its own block when it was written, given the finished blocks before it; the k-th
step of every block is one view, so that a completion takes as many views as the longest block had steps. With rho the
ratio of a token and A the z-score of the reward in its group, the loss is the mean over tokens of

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(s_ref - s) - (s_ref - s) - 1).

For models with full attention `steps="all"` scores every step in a view of its own.

Different from the released code:
- It averages over the tokens of a micro-batch, whose views are those of one index, so that late, small views count as
  much as full ones; `aggregation="tokens"` is the mean over the tokens of a batch, the same for all.
- Its old policy is left out where a batch is used for one step of the optimizer, as everywhere here.
- It draws with top-k 50, which scores do not know of; the default here is the whole distribution.
- It clamps log-ratios at 10 from either side; `clip="log"` never exponentiates what is clipped.
- It keeps groups whose accuracy is neither 0 nor 1; groups of equal rewards have no advantage here, either.
- `beta` is 0.1 in its configuration and 0 in its example; 0 here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl4dlm.training.advantages import z_scores
from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import TrajectoryConfig


@dataclass
class DiPOConfig(TrajectoryConfig):
    """Settings of DiPO; the defaults are those of the released example, but for sizes.

    Args:
        learning_rate: of AdamW.
        schedule: `"threshold"`, at 0.9 unless `schedule_args` says otherwise.
        epsilon, epsilon_high: clip range. beta: weight of the KL term.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    schedule: str = field(
        default="threshold", metadata={"help": "Name of the decoding schedule: which tokens are written when."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range of the policy ratio."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not allowed, since advantages are z-scores; allowed: group"
            )


class DiPOTrainer(TrajectoryTrainer):
    """DiPO in TRL's GRPO loop; `DiPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = DiPOConfig
    args: DiPOConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "dipo"]  # noqa: RUF012  (TRL's own form)
    _name = "DiPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "DiRL: An Efficient Post-Training Framework for Diffusion Language Models",
        "id": "2512.22234",
    }

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """z-scores; the deviation is that of the population."""
        return z_scores(rewards)
