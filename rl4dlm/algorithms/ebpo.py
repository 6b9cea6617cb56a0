"""EBPO, ELBO-based block-level policy optimisation (LLaDA2.1, arXiv 2602.08676): one ratio of sums of block bounds.

A model that denoises block by block has the bound sum_b ELBO(y_b | y_{<b}). In each of N views every block has a number
of hidden tokens of its own, k_b ~ U{1..L_b} of its L_b, and is scored given the finished blocks before it, so that one
forward gives all of them (`rl4dlm.likelihood.elbo`, `per_block`). With

    B(y) = mean over views of the sum over blocks of L_b / k_b times the log-probabilities of what is hidden,

the same views for the current, the old and the reference policy, and A the advantage, the loss of a completion is

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta / 2 (B - B_ref)^2,    rho = exp(B - B_old).

The ratio is of whole completions, so that a small change of the policy takes it far: it is clipped as a logarithm
(`clip="log"`), where nothing overflows, and hardly any completion teaches in later passes over a batch.
`ratio_norm="length"` divides exponent and KL term by the number of tokens, as ESPO does.

The report leaves out N, the views' weights, clip range, KL term, advantages and data. What is here is what DARE's
independent implementation (arXiv 2604.04215) makes of it, but for this:
- Its numbers of hidden tokens are spread over the blocks of a micro-batch. Here those of a block are spread over the
  views of its completion, and those of a view's blocks a golden ratio apart, whatever the batch.
- It averages a reference's bound that comes per token where it sums the policy's own. Here both are sums.
- A model without blocks in its attention is one block, and the bound the usual one.
- LLaDA2.1 also trains its editing, with wrong tokens in place of some visible ones; no published RL does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import STRATIFY, check_choice
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.clipping import CLIPS
from rl4dlm.training.sequence_ratio import RATIO_NORMS, SequenceRatioConfig, SequenceRatioTrainer
from rl4dlm.training.setup import of_noise


@dataclass
class EBPOConfig(SequenceRatioConfig):
    """Settings of EBPO; the report states none of them, the defaults are those of DARE's recipes.

    Args:
        num_views: N, views per completion and pass.
        complement: views come in pairs that hide complementary tokens of each block; `num_views` is even then.
        stratify: whether the numbers of hidden tokens are spread over the `"views"` of a completion, also over
            `"rows"`, or drawn one by one (`"none"`).
        ratio_norm: what the ratio's exponent and the KL term are divided by: nothing (`"none"`), or the `"length"`.
        clip: `"log"`, the clip of the ratio by its logarithm; see `rl4dlm.training.clipping`.
        num_generations: G, completions of a prompt.
        learning_rate: of AdamW.
        epsilon, epsilon_high: clip range. beta: weight of the KL term, which DARE's recipes do without.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_views: int = field(default=16, metadata={"help": "Views per completion and pass (N)."})
    complement: bool = field(default=False, metadata={"help": "Views come in pairs that hide complementary tokens."})
    stratify: str = field(
        default="views",
        metadata={
            "help": f"How counts of hidden tokens are spread: {', '.join(STRATIFY)}.",
            "choices": list(STRATIFY),
        },
    )
    ratio_norm: str = field(
        default="none",
        metadata={"help": "What the ratio's exponent is divided by: none or length.", "choices": list(RATIO_NORMS)},
    )
    clip: str = field(
        default="log", metadata={"help": f"How the ratio is clipped: {', '.join(CLIPS)}.", "choices": list(CLIPS)}
    )
    num_generations: int | None = field(default=8, metadata={"help": "Completions of a prompt (G)."})
    learning_rate: float = field(default=5e-7, metadata={"help": "Learning rate of AdamW, that of DARE's recipes."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio, per sequence."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ratio_norm", self.ratio_norm, RATIO_NORMS)
        self.estimator()

    def estimator(self, spec: DiffusionSpec | None = None) -> ELBO:
        """The estimator that these settings describe, for a model if given; ValueError where they describe none."""
        plain = ELBO(self.num_views, "count", self.complement, self.stratify, scope=self.scope)
        if spec is None or spec.attention not in BLOCK_KINDS:
            return plain
        return ELBO(
            self.num_views,
            "count",
            self.complement,
            self.stratify,
            scope=self.scope,
            per_block=True,
            block_length=spec.block_length,
            block_origin=spec.grid_origin,
        )


class EBPOTrainer(SequenceRatioTrainer):
    """EBPO in TRL's GRPO loop; `EBPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = EBPOConfig
    args: EBPOConfig
    _tag_names = ["trl", "rl4dlm", "ebpo"]  # noqa: RUF012  (TRL's own form)
    _name = "EBPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "LLaDA2.1: Speeding Up Text Diffusion via Token Editing",
        "id": "2602.08676",
    }

    def build_estimator(self) -> Estimator:
        """Views that hide something of every block."""
        return of_noise(self.model, self.args.estimator(self.spec))

    def log_ratio(self, difference: Tensor, length: Tensor) -> tuple[Tensor, Tensor | float]:
        """Of whole bounds, or of bounds per token."""
        return super().log_ratio(difference, length) if self.args.ratio_norm == "length" else (difference, 1.0)

    def kl_size(self, length: Tensor) -> Tensor | float:
        """1 for whole bounds."""
        return super().kl_size(length) if self.args.ratio_norm == "length" else 1.0
