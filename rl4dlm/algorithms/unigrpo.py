"""UniGRPO (MMaDA: Yang et al., arXiv 2505.15809, section 4.3): GRPO on the hidden tokens of canvases at rising levels.

In pass n over a batch of completions each token of a completion is hidden with probability t_n; the prompt is shown.
The levels of a completion start at random and rise evenly to 1 (`rl4dlm.likelihood.iid`). With s the log-probability of
a hidden token, rho = exp(s - s_old) from the same canvas, and A = (r - mean of the group's r) / their deviation,
the loss of a completion is the mean over its hidden tokens of

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta (exp(s_ref - s) - (s_ref - s) - 1).

No code was released with the paper. Where it says nothing, or contradicts itself, this is decided:
- Levels follow the paper's formula; the example in its text follows another one. `levels="uniform"` draws the level of
  each pass by itself, as the authors' later framework does (arXiv 2509.06949, levels on 0.1 to 0.9).
- With one pass there is no rise: the level is the random start.
- epsilon 0.2 and beta 0.01 are those of that later framework; 4 passes are those of SPG's re-implementation
  (arXiv 2510.09541). Nothing of it is in the paper.
- At a low level it may be that no token is hidden: the completion then counts for nothing in that pass.
- Tokens behind the first end stay hidden and are not scored, unless `scope="canvas"`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.training.config import check_ratio_level
from rl4dlm.training.loss_parts import resized
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer, PolicyScores

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "luspo", "sapo")


@dataclass
class UniGRPOConfig(DiffusionPolicyConfig):
    """Settings of UniGRPO; the defaults are the paper's where it says something.

    Args:
        levels: `"structured"`, rising over the passes, or `"uniform"`, drawn for each.
        level_range: of the random start of structured levels, or of uniform ones.
        num_iterations: mu, passes over a batch of completions.
        epsilon: clip range. beta: weight of the KL term.
        loss_type: one of TRL's that average over the hidden tokens of a completion or a micro-batch, or divide by a
            constant; `"grpo"` is the paper's.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    levels: str = field(
        default="structured",
        metadata={
            "help": "Levels of the passes: rising, or drawn for each.",
            "choices": ["structured", "uniform"],
        },
    )
    level_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Range of the random start of structured levels, or of uniform ones."},
    )
    num_iterations: int = field(default=4, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    loss_type: str = field(
        default="grpo", metadata={"help": "How the losses of hidden tokens are averaged.", "choices": list(LOSS_TYPES)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio_level(self, self.estimator())
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type={self.loss_type!r} is not allowed; the number of hidden tokens differs by pass, so "
                f"choose one of {', '.join(LOSS_TYPES)}"
            )

    def estimator(self) -> IIDRatio:
        """The estimator that these settings describe; ValueError for settings that describe none."""
        low_high: Any = tuple(self.level_range)
        return IIDRatio(self.num_iterations, self.levels, low_high, scope=self.scope)


class UniGRPOTrainer(DiffusionPolicyTrainer):
    """UniGRPO in TRL's GRPO loop; `UniGRPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = UniGRPOConfig
    args: UniGRPOConfig
    _tag_names = ["trl", "rl4dlm", "unigrpo"]  # noqa: RUF012  (TRL's own form)
    _name = "UniGRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "MMaDA: Multimodal Large Diffusion Language Models",
        "id": "2505.15809",
    }

    def build_estimator(self) -> Estimator:
        """A view whose level rises over the passes."""
        return of_noise(self.model, self.args.estimator())

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """As in TRL's loss: which tokens are hidden is known of all rows."""
        return super().rows_that_count(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """TRL's loss of the hidden tokens alone."""
        assert scores.views is not None
        mask = batch["completion_mask"]
        hidden = resized(scores.views.scored.any(1), mask.shape[1])
        return super().loss(scores, {**batch, "completion_mask": mask * hidden})
