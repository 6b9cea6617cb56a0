"""LLaDOU (Huang et al., arXiv 2505.10446): a denoiser and the order it unmasks in are learnt together, by DCoLT.

A module that reads hidden states draws which slots a step writes (schedule `learned_order`), so that a step has an
exact log-probability ell_s, that of its ordered slots and of the tokens there (`rl4dlm.training.unmasking` has it).
With rho_s = exp(ell_s - ell_s^old), A = (r - mean of the group's r) / (std + 1e-4) and S steps, the loss of a batch is

    - sum over completions, sum over steps s of  min(rho_s A, clip(rho_s, 1 - epsilon, 1 + epsilon) A) / (S V),

V the number of completions with A != 0; there is no KL term.

Different from the released code, or chosen where it leaves things open:
- V is counted in the generation batch of all processes; there in each prompt's group, as the mean over processes.
- Sums over slots are logarithmic; there exp of plain utilities, from whose sum is subtracted.
- Non-finite gradients skip the step, and are counted (`max_skipped_steps`); there they are set to zero.
- Scores have the temperature of the rollout (`score_temperature`); the code ignores it at any other than 1.
- The density is that of the *ordered* draw. The set that is written has the sum over its orders; the order is one more
  thing to learn from, without bias and with more variance.
- Several passes over a batch are possible (`num_iterations`); the code has one, where ratios are 1.
- Padding is on the left and hidden; the mask token is never drawn.
- The module's transformer block is of our own making, since neither paper nor our notes of the code say what is in it.
  The SEDD variant is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.training.trajectory_settings import AGGREGATIONS, RATIO_UNITS
from rl4dlm.training.unmasking import UnmaskingTrainer
from rl4dlm.training.unmasking_settings import UnmaskingConfig


@dataclass
class LLaDOUConfig(UnmaskingConfig):
    """Settings of LLaDOU; the defaults are those of the released example.

    Args:
        num_generations: G, completions of a prompt.
        learning_rate: of AdamW.
        temperature: of the rollout and of scores.
        epsilon: clip range of a step's ratio. beta: 0, there is no KL term.
        scale_rewards: advantages are divided by the group's standard deviation.
        ratio_unit: a `"step"`, its places and its tokens.
        aggregation: `"row_sums"`, which the trainer divides by S, and by the share of completions with an advantage.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_generations: int | None = field(default=16, metadata={"help": "Completions of a prompt (G), the paper's 16."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the rollout and of scores."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio of a step."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL term; it must be 0."})
    ratio_unit: str = field(
        default="step", metadata={"help": "What has a policy ratio of its own.", "choices": list(RATIO_UNITS)}
    )
    aggregation: str = field(
        default="row_sums",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation != "row_sums":
            raise ValueError(f"aggregation={self.aggregation!r} is not allowed; allowed: row_sums")


class LLaDOUTrainer(UnmaskingTrainer):
    """LLaDOU in TRL's GRPO loop; `LLaDOUConfig` has its settings, the module's docstring the algorithm."""

    config_class = LLaDOUConfig
    args: LLaDOUConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "lladou"]  # noqa: RUF012  (TRL's own form)
    _name = "LLaDOU"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Reinforcing the Diffusion Chain of Lateral Thought with Diffusion Language Models",
        "id": "2505.10446",
    }

    def prepare_batch(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Adds the share of completions with an advantage, of all processes."""
        counted = self.accelerator.gather(self.with_advantage(batch).double())
        batch["advantage_share"] = counted.mean().expand(len(batch["advantages"])).contiguous()

    def _aggregated(self, losses: Tensor, weight: Tensor, *args: Any) -> Tensor:
        summed: Tensor = super()._aggregated(losses, weight, *args)
        batch: dict[str, Any] = args[-1]
        share = batch.get("advantage_share")
        if share is None:  # of an evaluation
            share = self.with_advantage(batch).double()
        valid = share.mean().clamp(min=torch.finfo(torch.float32).tiny).to(summed)
        return summed / (self.decoding.steps_per_block * self.decoding.num_blocks * valid)
