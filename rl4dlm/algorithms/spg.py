"""Sandwiched policy gradient: bounds of the likelihood instead of the likelihood (SPG, arXiv 2510.09541).

With S_lower and S_upper a lower and an upper bound of log p(y), estimated from m views (`rl4dlm.likelihood.blockwise`),
and A_i the reward of completion i less its group's mean,

    S_i  = S_lower(y_i)                                       where A_i > 0
           omega * S_upper(y_i) + (1 - omega) * S_lower(y_i)   elsewhere
    loss = -sum_i A_i S_i / sum_i |y_i|.

What is good becomes likelier if its lower bound rises, and what is bad unlikelier if its upper bound falls. There is no
policy ratio, no clipping and no KL term; a batch may be used several times, with new views each time. What the two
bounds are and are not is written where they are computed.

Decided differently from the released code: the denominator is of the whole batch of completions, not of a micro-batch,
so that splitting a batch changes nothing; the views of a completion take different blocks (`block_choice`); padding is
neither seen nor counted as a prompt; masks come from keys, not from the global generator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from rl4dlm.likelihood.blockwise import BOUNDS, MODES, BlockELBO, BlockwiseBound
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.loss_parts import resized
from rl4dlm.training.losses import weighted_likelihood
from rl4dlm.training.ratio_free import RatioFreeConfig
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyTrainer, PolicyScores

__all__ = ["SPGConfig", "SPGTrainer"]

MASKING = (*MODES, "block_elbo")
NEGATIVES = (*BOUNDS, "zero")


@dataclass
class SPGConfig(RatioFreeConfig):
    """Settings of `SPGTrainer`: those of `DiffusionPolicyConfig`, with SPG's own. The defaults are the paper's, but for
    `block_choice`.

    Args:
        num_generations: G, completions of a prompt; `per_device_train_batch_size` is one group.
        learning_rate: of AdamW.
        block_length: of decoding and of the views. None: the paper's 32; where the canvas does not hold several of
            them, the longest shorter blocks that divide it.
        num_views: m, views per completion and pass.
        masking: what a view hides: `"block_random"`, some tokens of a block and all later blocks; `"block_all"`, a
            block and all later ones; `"random"`, a random number of tokens; `"all"`, all tokens; `"block_elbo"`, as
            `"block_random"`, for the evidence lower bound of block-wise decoding, which takes the place of S_lower and
            needs `negatives="elbo"` or `"zero"`: it has no upper bound and never hides prompts or earlier blocks.
            Blocks are those that completions are decoded in. There are several of them, else every `"block_"` masking
            would be another one under its name, and is refused.
        negatives: what completions that are not better than their group's mean count with: the `"mix"` of both
            bounds, the upper one (`"eubo"`), the lower one (`"elbo"`), or nothing (`"zero"`).
        eubo_beta: exponent of the upper bound, 1 or larger.
        mix_weight: omega, share of the upper bound in the mix.
        p_mask_prompt: probability that a prompt token, or a token of an earlier block, is hidden.
        block_choice: `"stratified"`, views of a completion take different blocks; `"published"`, as the released code.
        scored: all `"hidden"` tokens, as published, or those of a view's own `"block"`.
        num_iterations: passes over a batch of completions (mu), each with views of its own.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    paper_block_length: ClassVar[int | None] = 32
    num_generations: int | None = field(default=6, metadata={"help": "Completions of a prompt (G), the paper's 6."})
    per_device_train_batch_size: int = field(
        default=6, metadata={"help": "Completions per process and pass; the paper has a group of 6."}
    )
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    num_views: int = field(default=2, metadata={"help": "Views per completion and pass (m)."})
    masking: str = field(
        default="block_random",
        metadata={"help": f"What a view hides: {', '.join(MASKING)}.", "choices": list(MASKING)},
    )
    negatives: str = field(
        default="mix",
        metadata={
            "help": f"What completions that are not better than average count with: {', '.join(NEGATIVES)}.",
            "choices": list(NEGATIVES),
        },
    )
    eubo_beta: float = field(default=1.5, metadata={"help": "Exponent of the upper bound, 1 or larger."})
    mix_weight: float = field(default=0.5, metadata={"help": "Share of the upper bound in the mix of bounds."})
    p_mask_prompt: float = field(
        default=0.15,
        metadata={"help": "Probability with which tokens of the prompt and of earlier blocks are hidden."},
    )
    block_choice: str = field(
        default="stratified", metadata={"help": "How views choose their blocks: stratified or published."}
    )
    scored: str = field(default="hidden", metadata={"help": "Which tokens count: hidden ones, or those of the block."})
    num_iterations: int = field(default=4, metadata={"help": "Passes over a batch of completions (mu)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("masking", self.masking, MASKING)
        check_choice("negatives", self.negatives, NEGATIVES)
        assert self.max_completion_length is not None
        self.check_blocks(self.block_length, self.max_completion_length)
        if self.masking == "block_elbo" and self.negatives not in ("elbo", "zero"):
            raise ValueError(
                f"negatives={self.negatives!r} is not allowed with masking='block_elbo', which has no upper bound; "
                "choose elbo or zero"
            )
        try:
            self.estimator(block_length=1)
        except ValueError as error:
            message = str(error)
            for theirs, ours in (("mode=", "masking="), ("beta=", "eubo_beta=")):
                message = ours + message.removeprefix(theirs) if message.startswith(theirs) else message
            raise ValueError(message) from None

    def default_block_length(self, canvas_length: int) -> int | None:
        """The paper's, or for block masking on other canvases the longest shorter one that divides them."""
        block = super().default_block_length(canvas_length)
        if block is not None or not self.masking.startswith("block_"):
            return block
        assert self.paper_block_length is not None
        shorter = range(2, min(self.paper_block_length, canvas_length // 2) + 1)
        return max((length for length in shorter if canvas_length % length == 0), default=None)

    def check_blocks(self, block_length: int | None, canvas_length: int) -> None:
        """Refuse block masking of a single block, which hides what another masking does: the one that the paper drops.

        Raises:
            ValueError: names both settings and what is allowed.
        """
        if not self.masking.startswith("block_") or (block_length is not None and block_length < canvas_length):
            return
        other = {"block_random": "'random'", "block_all": "'all'"}.get(self.masking, "an ELBO without blocks")
        raise ValueError(
            f"block_length={block_length} is not allowed with masking={self.masking!r} and max_completion_length="
            f"{canvas_length}: a single block makes it {other}; give a block_length that divides the canvas into "
            "several, or choose masking random or all"
        )

    def refused_settings(self) -> dict[str, str]:
        """Those of policy ratios and KL terms, and SPG's own that others leave without effect."""
        refused, masking, negatives = super().refused_settings(), f"masking={self.masking!r}", self.negatives
        refused["negative_advantage_weight"] = "negatives says what becomes of completions below the baseline"
        if not self.masking.startswith("block_") or self.masking == "block_elbo":
            refused |= dict.fromkeys(("block_choice", "scored"), f"it has no effect with {masking}")
        if self.masking == "block_elbo":
            refused["p_mask_prompt"] = f"it has no effect with {masking}"
        if negatives in ("elbo", "zero"):
            refused["eubo_beta"] = f"it has no effect with negatives={negatives!r}"
        if negatives in ("elbo", "zero", "eubo"):
            refused["mix_weight"] = f"it has no effect with negatives={negatives!r}"
        return refused

    def estimator(self, block_length: int) -> BlockwiseBound | BlockELBO:
        """The views and bounds, with blocks of a given length."""
        if self.masking == "block_elbo":
            return BlockELBO(num_views=self.num_views, block_length=block_length, scope=self.scope)
        return BlockwiseBound(
            num_views=self.num_views,
            mode=self.masking,
            bound="elbo",
            beta=self.eubo_beta,
            mix_weight=self.mix_weight,
            block_length=block_length,
            p_mask_prompt=self.p_mask_prompt,
            block_choice=self.block_choice,
            scored=self.scored,
            scope=self.scope,
        )


class SPGTrainer(DiffusionPolicyTrainer):
    """SPG in TRL's GRPO loop; `SPGConfig` has its settings, the module's docstring the algorithm."""

    config_class = SPGConfig
    args: SPGConfig
    uses_old_policy = False
    _tag_names = ["trl", "rl4dlm", "spg"]  # noqa: RUF012  (TRL's own form)
    _name = "SPG"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "SPG: Sandwiched Policy Gradient for Masked Diffusion Language Models",
        "id": "2510.09541",
    }

    def build_estimator(self) -> Estimator:
        """The views and bounds, in the blocks of the rollout."""
        self.args.check_blocks(self.decoding.block_length, self.decoding.canvas_length)
        self._bounds = self.args.estimator(self.decoding.block_length or self.decoding.canvas_length)
        return of_noise(self.model, self._bounds)

    def bounds(self, scores: PolicyScores, positive: Tensor) -> Tensor:
        """Scores `[B, C]` per token: of the lower bound where `positive` (bool `[B]`), of the negatives' elsewhere."""
        lower = scores.log_probs
        if self.args.negatives == "zero":
            return lower * positive[:, None]
        if self.args.negatives == "elbo":
            return lower
        assert scores.view_log_probs is not None and scores.views is not None
        assert isinstance(self._bounds, BlockwiseBound)
        upper = self._bounds.reduce_to(self.args.negatives, scores.view_log_probs, scores.views)
        return lower.where(positive[:, None], resized(upper, lower.shape[1]))

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor:
        """Those with an advantage; with `negatives="zero"`, with one above zero."""
        counted = self.with_advantage(batch)
        return counted & (batch["advantages"] > 0) if self.args.negatives == "zero" else counted

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """`-sum_i A_i S_i`, per token of the batch of completions."""
        self.log_entropy(scores, batch["completion_mask"])
        advantages = batch["advantages"]
        values = weighted_likelihood(self.bounds(scores, advantages > 0), advantages[:, None])
        return self.mean_over_tokens(values, batch["completion_mask"], batch)
