"""StableDRL (arXiv 2603.06743): SPG's sandwich with importance weights that are clipped and normalised over groups.

SPG (`spg.py`) uses a batch of completions several times as if the policy that it trains had written them. Here each
completion has the weight that corrects for that, clipped whatever the sign of its advantage, and normalised. With
S_lower the lower bound of log p(y), S the bound that SPG takes for a completion's advantage A = r - mean of the group's
r, both over n = |y| tokens, and all policies in the same views,

    rho_j = exp((S_lower(y_j) - S_lower,old(y_j)) / n_j)
    w_j   = clip(rho_j, 1 - epsilon, 1 + epsilon_high),    a constant
    loss  = -sum_j w_j / (sum of the group's w) A_j S(y_j) / n_j             over a group; the mean over groups.

The gradient of a completion is bounded by its weight, however wrong the estimate of rho is, where PPO's clip lets it
grow without bound for A < 0; and the update stays among the convex combinations of what single completions ask for. At
the policy that wrote the completions all weights are 1 / G, which is SPG but for its weighting by lengths. Without a
range, `epsilon=0, epsilon_high=0`, they are so always. Nothing is special about block models: their bounds are those of
one forward with a clean and a noised copy, in which a block sees itself and the finished ones before it.

Published are c = 5, which clips from above only (`epsilon=1, epsilon_high=4`), and a ratio per token, at which c hardly
ever acts; `ratio_norm="none"` is the ratio of whole sequences. The paper's own formulas could not be read.

Decided differently from the released code:
- Its numerator and denominator have masks of their own, so that weights are noise even where both policies are the
  same. Here all policies are scored in the same views.
- Its weights are normalised over the rows of a micro-batch, which are one group with its settings; here over groups,
  wherever their completions are.
- It adds a reward of 1 unless a completion is short and mostly a boxed answer. Rewards are the user's here.
- Views of a completion take different blocks (`block_choice`), and what else is decided in `spg.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl4dlm.algorithms.spg import SPGConfig, SPGTrainer
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.clipping import CLIPS, SELF_NORMALIZE
from rl4dlm.training.sequence_ratio import RATIO_NORMS
from rl4dlm.training.trainer import PolicyScores

__all__ = ["StableDRLConfig", "StableDRLTrainer"]

_ONE_WEIGHT = "the loss has one weight per sequence"


@dataclass
class StableDRLConfig(SPGConfig):
    """Settings of `StableDRLTrainer`: those of `SPGConfig`, and these. The defaults are those of the released code, but
    for `block_choice`.

    Args:
        num_generations: G, completions of a prompt; `per_device_train_batch_size` is one group.
        clip: `"unconditional"`; others have no weights.
        epsilon, epsilon_high: weights are clipped to [1 - epsilon, 1 + epsilon_high]; 1 is no lower end.
        self_normalize: what weights add up to 1 over: the `"group"`, all of an optimizer step (`"batch"`), or `"none"`:
            weights of G completions add up to G on average.
        ratio_norm: what the ratio's exponent is divided by: the `"length"`, or nothing (`"none"`).
        num_iterations: passes over a batch of completions (mu), each with views of its own; the first has no weights
            but 1.
        learning_rate: of AdamW; 1e-6 for Countdown and Sudoku.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_generations: int | None = field(default=16, metadata={"help": "Completions of a prompt (G), the paper's 16."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Completions per process and pass; the paper has a group of 16."}
    )
    learning_rate: float = field(default=2e-6, metadata={"help": "Learning rate of AdamW, the paper's for MATH."})
    clip: str = field(
        default="unconditional",
        metadata={"help": "What is done with policy ratios: unconditional.", "choices": list(CLIPS)},
    )
    self_normalize: str = field(
        default="group",
        metadata={
            "help": f"What weights are divided by the mean of: {', '.join(SELF_NORMALIZE)}.",
            "choices": list(SELF_NORMALIZE),
        },
    )
    epsilon: float = field(default=1.0, metadata={"help": "Weights are at least 1 - epsilon; 1 is no lower end."})
    epsilon_high: float | None = field(default=4.0, metadata={"help": "Weights are at most 1 + epsilon_high."})
    ratio_norm: str = field(
        default="length",
        metadata={
            "help": "What the ratio's exponent is divided by: length or none.",
            "choices": list(RATIO_NORMS),
        },
    )
    num_iterations: int = field(default=2, metadata={"help": "Passes over a batch of completions (mu)."})

    def __post_init__(self) -> None:
        check_choice("ratio_norm", self.ratio_norm, RATIO_NORMS)
        if self.clip != "unconditional":
            raise ValueError(
                f"clip={self.clip!r} is not allowed: StableDRL's ratios are weights of bounds, not ratios of what it "
                "raises and lowers; needed: 'unconditional'"
            )
        super().__post_init__()

    def refused_settings(self) -> dict[str, str]:
        """SPG's, but for those of the ratio."""
        refused = super().refused_settings()
        for name in ("epsilon", "epsilon_high", "delta", "clip", "self_normalize"):
            del refused[name]
        return refused | dict.fromkeys(("importance_sampling_level", "off_policy_mask_threshold"), _ONE_WEIGHT)


class StableDRLTrainer(SPGTrainer):
    """StableDRL in TRL's GRPO loop; `StableDRLConfig` has its settings, the module's docstring the algorithm."""

    config_class = StableDRLConfig
    args: StableDRLConfig
    uses_old_policy = True
    _tag_names = ["trl", "rl4dlm", "stabledrl"]  # noqa: RUF012  (TRL's own form)
    _name = "StableDRL"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Stabilizing Reinforcement Learning for Diffusion Language Models",
        "id": "2603.06743",
    }

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor:
        """SPG's; where weights are normalised all that share a weight with one that has an advantage."""
        if self.args.self_normalize == "none":
            return super().rows_that_count(batch)
        return self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """`-w_j A_j S_j / n_j`, a mean over completions with weights whose mean is 1."""
        mask, advantages = batch["completion_mask"], batch["advantages"]
        counts, length = mask.any(-1), mask.sum(-1).clamp(min=1)
        log_ratio = (self.log_ratio_to("old", scores.log_probs, batch) * mask).sum(-1)  # of lower bounds
        if self.args.ratio_norm == "length":
            log_ratio = log_ratio / length
        bound = (self.bounds(scores, advantages > 0) * mask).sum(-1) / length
        values = self.surrogate(log_ratio, bound, advantages, counts, batch)
        self.log_clipped(log_ratio, advantages, counts)
        self.log_entropy(scores, mask)
        return self.mean_over_rows(values * counts)
