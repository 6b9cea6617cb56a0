"""diffu-GRPO (d1: Zhao et al., arXiv 2504.12216): GRPO with mean-field log-probabilities under random prompt masks.

The score s of a completion token is its log-probability when the whole completion is hidden, and each prompt token too
with probability p. With A = r - mean of the group's r and rho = exp(s - s_old), the loss per token is (section 3.1)

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta (exp(s_ref - s) - (s_ref - s) - 1).

A batch of completions is used for mu passes, each under prompt masks of its own (algorithm 1).

Where the paper and its released code differ, or both are wrong, this is decided:
- Averages: the paper's is per sequence, then over sequences; the code's over all tokens of a micro-batch
  (`loss_type="bnpo"`). The default here, `"dapo"`, is over all tokens of a generation batch, so that splitting it into
  micro-batches changes nothing.
- Tokens after the first end of sequence count neither for the loss (as in paper and code) nor for the reward (unlike
  in the code, which rewards the text of all slots).
- The code's index of the prompt mask counts micro-steps, so that with gradient accumulation only some of the mu masks
  are ever used. Here it counts passes.
- The code attends to padding and may mask it; here padding is hidden.
- The code re-seeds the global generators for every mask and has dropout on; here masks are keyed and dropout is off.
- `num_strata` Q > 1 scores a completion in Q views that hide a stratum of its tokens each and show the others, the
  likelihood of DACA-GRPO (arXiv 2605.16342; `rl4dlm.likelihood.strata`): more context, Q forwards, and no bound.
- A model whose noise is random tokens is scored on a canvas of random tokens, and random tokens replace those of the
  prompt; the paper knows masks only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_count
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.strata import Strata
from rl4dlm.training.config import check_ratio_level
from rl4dlm.training.setup import mean_field, of_noise
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer


@dataclass
class DiffuGRPOConfig(DiffusionPolicyConfig):
    """Settings of diffu-GRPO; the defaults are the paper's, but for `loss_type`, on which see the module's docstring.

    Args:
        num_generations: G, completions of a prompt; `per_device_train_batch_size` is one group. block_length: 32.
        learning_rate: of AdamW.
        p_mask_prompt: probability with which a prompt token is hidden from the policy when it is scored.
        num_strata: Q, views that hide a part of the completion each; 1: the whole, which is diffu-GRPO.
        num_iterations: mu, passes over a batch of completions: 12 for GSM8K and MATH, 8 for Countdown and Sudoku.
        epsilon: clip range. beta: weight of the KL term.
        scale_rewards: `"none"`: advantages are not divided by the group's standard deviation.
        temperature: of the rollout; scores are computed at `score_temperature` 1.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    paper_block_length: ClassVar[int | None] = 32
    num_generations: int | None = field(default=6, metadata={"help": "Completions of a prompt (G), the paper's 6."})
    per_device_train_batch_size: int = field(
        default=6, metadata={"help": "Completions per process and pass; the paper has a group of 6."}
    )
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    p_mask_prompt: float = field(
        default=0.15, metadata={"help": "Probability with which a prompt token is hidden when completions are scored."}
    )
    num_strata: int = field(
        default=1,
        metadata={"help": "Views that hide a part of the completion each, and show the others; 1: all of it."},
    )
    num_iterations: int = field(default=12, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.04, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    temperature: float = field(default=0.9, metadata={"help": "Temperature of the rollout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        MeanField(self.p_mask_prompt, self.scope)
        check_count("num_strata", self.num_strata)
        check_ratio_level(self, Strata(self.num_strata, self.p_mask_prompt, self.scope))


class DiffuGRPOTrainer(DiffusionPolicyTrainer):
    """diffu-GRPO in TRL's GRPO loop; `DiffuGRPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = DiffuGRPOConfig
    args: DiffuGRPOConfig
    _tag_names = ["trl", "rl4dlm", "diffu-grpo"]  # noqa: RUF012  (TRL's own form)
    _name = "diffu-GRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        "id": "2504.12216",
    }

    def build_estimator(self) -> Estimator:
        """The mean-field estimator of the model's noise, with this run's prompt masking; or that of strata."""
        if self.args.num_strata > 1:
            return of_noise(self.model, Strata(self.args.num_strata, self.args.p_mask_prompt, self.args.scope))
        return mean_field(self.model, self.args.p_mask_prompt, self.args.scope)
