"""TraceRL (Wang et al., arXiv 2509.06949): clipped ratios of tokens in the order in which they were written.

Every s consecutive steps of the record are merged (*shrinkage*); the tokens of a merged step are scored in the state
before its first one. With rho_i = p(y_i | state) / p_old(y_i | state) and A the z-score of the reward in its group, the
loss of a completion is

    sum over tokens of  [-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta KL_i] / L,

L the canvas, KL_i = exp(s_old - s) - (s_old - s) - 1 to the policy that wrote the completions. A model that denoises
block by block has steps merged within each block, and one view scores the k-th of every block (`steps="all"`); for
full attention each merged step is a view. The paper's s is 1 for block models and 8 for full attention. With
`value_model="steps"` A is that of a token, from values of states (`rl4dlm.training.value` has the equations).

Different from the released code, or chosen where it and the paper differ:
- Averages: the paper adds up the means of steps (`aggregation="step_sums"`); the code of block models, which its
  results come from, divides the sum over tokens by L (the default); that for full attention takes the mean over the
  tokens of a row, but the sum of its KL terms.
- The code clamps log-ratios of block models at 10 from either side; `clip="log"` never exponentiates what is clipped.
- Tokens behind the first end of sequence are not scored, as with the code's `post_num=0`.
- The code drops prompts whose share of right answers is outside 0.2 to 0.8, takes completions that were cut off for
  wrong and loses the last micro-batches of a rollout; none of it is done here (`mask_truncated_completions` leaves out
  those that were cut off).
- Completions are shuffled over the steps of a batch; there, the steps of a completion follow each other.
- Padding is hidden for all families.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl4dlm.training.advantages import z_scores
from rl4dlm.training.config import KL_TARGETS
from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import AGGREGATIONS, TrajectoryConfig


@dataclass
class TraceRLConfig(TrajectoryConfig):
    """Settings of TraceRL; the defaults are the paper's for block models, but for sizes.

    Args:
        merge: s, the shrinkage: 1 for block models; the paper has 8 for full attention.
        learning_rate: of AdamW.
        epsilon: clip range. beta: weight of the KL term, which is to the old policy (`kl_target`).
        steps_per_generation: micro-batches of a rollout batch; with a KL term and one pass, four optimizer steps
            each unless it is given: in the first one that term is zero.
        aggregation: `"canvas"`: the sum over tokens, over the length of the canvas.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term."})
    kl_target: str = field(
        default="old",
        metadata={"help": "Policy that the KL term is to: reference or old.", "choices": list(KL_TARGETS)},
    )
    aggregation: str = field(
        default="canvas",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )

    def __post_init__(self) -> None:
        given = any(getattr(self, name) is not None for name in ("steps_per_generation", "generation_batch_size"))
        if self.beta and self.kl_target == "old" and self.num_iterations == 1 and not given:
            self.steps_per_generation = 4 * self.gradient_accumulation_steps
        super().__post_init__()
        if self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not allowed, since advantages are z-scores; allowed: group"
            )


class TraceRLTrainer(TrajectoryTrainer):
    """TraceRL in TRL's GRPO loop; `TraceRLConfig` has its settings, the module's docstring the algorithm."""

    config_class = TraceRLConfig
    args: TraceRLConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "tracerl"]  # noqa: RUF012  (TRL's own form)
    _name = "TraceRL"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models",
        "id": "2509.06949",
    }

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """z-scores; the deviation is that of the population."""
        return z_scores(rewards)
