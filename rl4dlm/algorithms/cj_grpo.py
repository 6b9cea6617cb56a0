"""CJ-GRPO (Yang et al., arXiv 2509.23924): GRPO on every recorded step, each scored in the state that it was taken in.

With U_s the tokens that step s wrote, x_{s-1} the canvas before it, rho_i = p(y_i | x_{s-1}) / p_old(y_i | x_{s-1}) and
A = r - mean of the group's r, the loss of a completion is (equation 11)

    mean over steps s of the mean over i in U_s of  -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta KL_i,

KL_i = exp(s_ref - s) - (s_ref - s) - 1. A batch of completions is used for mu passes. The paper decodes with its own
schedules `eoser`, `ass` and `eoser_ass` (`schedule`); a forward per step is the price, in the memory of one.

Different from the released code:
- It averages the tokens of a step over the whole micro-batch, which is the paper's loss as long as all completions
  write as many tokens in each step; here each completion has means of its own, whatever its micro-batch.
- Tokens behind the first end of sequence, and steps that wrote nothing else, count nowhere (`scope="canvas"` with
  `stop_at_eos=False` is the code's).
- Padding is hidden; dropout is off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import AGGREGATIONS, TrajectoryConfig


@dataclass
class CJGRPOConfig(TrajectoryConfig):
    """Settings of CJ-GRPO; the defaults are those of the released code.

    Args:
        num_generations: G, completions of a prompt; `per_device_train_batch_size` is one group.
        learning_rate: of AdamW.
        num_iterations: mu, passes over a batch of completions: 12 for GSM8K and MATH, 8 for Countdown and Sudoku.
        epsilon: clip range. beta: weight of the KL term.
        scale_rewards: `"none"`: advantages are not divided by the group's standard deviation.
        aggregation: `"steps"`: means over the tokens of a step, then over steps.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_generations: int | None = field(default=6, metadata={"help": "Completions of a prompt (G), the paper's 6."})
    per_device_train_batch_size: int = field(
        default=6, metadata={"help": "Completions per process and pass; one group."}
    )
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    num_iterations: int = field(default=12, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.04, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    aggregation: str = field(
        default="steps",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )


class CJGRPOTrainer(TrajectoryTrainer):
    """CJ-GRPO in TRL's GRPO loop; `CJGRPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = CJGRPOConfig
    args: CJGRPOConfig
    _tag_names = ["trl", "rl4dlm", "cj-grpo"]  # noqa: RUF012  (TRL's own form)
    _name = "CJ-GRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer "
        "Decoding Step",
        "id": "2509.23924",
    }
