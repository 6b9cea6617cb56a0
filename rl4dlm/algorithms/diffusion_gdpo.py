"""GDPO, Group Diffusion Policy Optimization (Rojas et al., arXiv 2510.08554): ratios of bounds by quadrature.

This is not NVIDIA's GDPO (Group reward-Decoupled Normalization, arXiv 2601.05242), which normalises each of several
rewards by itself: TRL has that one as `multi_objective_aggregation="normalize_then_sum"`, for this and every other
algorithm here whose advantages are TRL's: not for the weights of wd1 and DMPO, nor with `baseline="leave_one_out"`.

B(y) estimates the evidence lower bound of log p(y) at N fixed levels with K masks each, the nodes and weights of a
Gauss-Legendre rule (`rl4dlm.likelihood.quadrature`), the same masks for the current, the old and the reference policy.
Drawing the level is where most of the variance of the usual estimate comes from. With n = |y| and A = r - mean of the
group's r, the loss of a completion is

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta / (2 n) (B - B_ref)^2,    rho = exp((B - B_old) / n),

or, with `ratio_norm="none"`, as the paper writes it: the first term over n, with rho = exp(B - B_old).

Where the sources differ, or say nothing, this is decided:
- The paper's ratio is of whole sequences, and after a few updates nearly all of them are clipped. The code that can be
  inspected (NeMo-RL's) divides the exponent by n and takes epsilon 0.5; that is the default here.
- That code draws exactly floor(t |y|) tokens per mask (at least 1) and still weights by 1/t, which is exact for no N:
  `masks="count"`. The default, `"bernoulli"`, hides tokens independently, and is exact in expectation for short
  completions. `masks="count"` with `weight="count"` has no scale error.
- KL: the paper has a term without an estimator, that code none. Here it is off, and otherwise the square above, since
  the other estimators are useless on whole sequences (arXiv 2512.03759).
- That code derives masks from the tokens, so that equal completions have equal masks in all passes; here they are keyed
  by row and pass. Its three points that it calls Simpson's are left out: they are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.likelihood.quadrature import Quadrature
from rl4dlm.training.sequence_ratio import RATIO_NORMS, SequenceRatioConfig, SequenceRatioTrainer
from rl4dlm.training.setup import of_noise


@dataclass
class DiffusionGDPOConfig(SequenceRatioConfig):
    """Settings of diffusion GDPO; the defaults are the paper's where it says something.

    Args:
        nodes: N, levels of the quadrature.
        masks_per_node: K.
        masks: `"bernoulli"`, tokens hidden independently, or `"count"`, a fixed number of them.
        weight: `"level"`, 1/t, or `"count"`, |y| over the number of hidden tokens, for `masks="count"`.
        ratio_norm: what the exponent of the ratio is divided by: the `"length"`, or nothing (`"none"`) as in the paper.
        num_iterations: mu, passes over a batch of completions; with 1 nothing is ever clipped.
        epsilon: clip range. beta: weight of the KL term.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    nodes: int = field(default=3, metadata={"help": "Levels of the quadrature (N)."})
    masks_per_node: int = field(default=1, metadata={"help": "Masks at each level (K)."})
    masks: str = field(
        default="bernoulli",
        metadata={"help": "Tokens hidden independently, or a fixed number.", "choices": ["bernoulli", "count"]},
    )
    weight: str = field(
        default="level",
        metadata={"help": "Weight of hidden tokens: by level, or by their count.", "choices": ["level", "count"]},
    )
    ratio_norm: str = field(
        default="length",
        metadata={
            "help": "What the ratio's exponent is divided by: length or none.",
            "choices": list(RATIO_NORMS),
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the policy ratio, per sequence."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.estimator()
        check_choice("ratio_norm", self.ratio_norm, RATIO_NORMS)

    def estimator(self) -> Quadrature:
        """The estimator that these settings describe; ValueError for settings that describe none."""
        return Quadrature(self.nodes, self.masks_per_node, self.masks, self.weight, self.scope)


class DiffusionGDPOTrainer(SequenceRatioTrainer):
    """GDPO in TRL's GRPO loop; `DiffusionGDPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = DiffusionGDPOConfig
    args: DiffusionGDPOConfig
    _tag_names = ["trl", "rl4dlm", "diffusion-gdpo"]  # noqa: RUF012  (TRL's own form)
    _name = "GDPO (diffusion)"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Improving Reasoning for Diffusion Language Models via Group Diffusion Policy Optimization",
        "id": "2510.08554",
    }

    def build_estimator(self) -> Estimator:
        """Views at the nodes of a Gauss-Legendre rule."""
        return of_noise(self.model, self.args.estimator())

    def log_ratio(self, difference: Tensor, length: Tensor) -> tuple[Tensor, Tensor | float]:
        """Of bounds per token, or of whole ones, whose surrogate counts for one token."""
        if self.args.ratio_norm == "length":
            return super().log_ratio(difference, length)
        return difference, 1 / length
