"""JustGRPO (Ni et al., arXiv 2601.15165): plain GRPO on completions that are decoded from left to right.

Token k is written alone, given the prompt, the tokens before it and a hidden rest, so that its log-probability is exact
and the policy is an ordinary autoregressive one:

    rho_k = p(y_k | y_<k, hidden rest) / p_old(y_k | y_<k, hidden rest),
    A = (r - mean of the group's r) / standard deviation of the group's r,

with GRPO's loss per token, -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A). The trained model can still be decoded
in parallel. The price is one view per token (`rl4dlm.likelihood.left_to_right`): a canvas of 256 tokens is scored in
256 forwards per completion, in the memory of one (`one_view`).

Exact they are where completions were drawn from the distribution that is scored, so that what changes the one and not
the other is refused: a rollout at another temperature than `score_temperature`, cut distributions (`top_p`, `top_k`),
tokens that are never, later or less often drawn, caches (unless `rollout_correction` makes up for what they do to the
draws), and interventions, which give slots behind those that are being written. One thing is left: the mask token is
never drawn, so that the log-probability of a draw is the score less log(1 - p(mask)), which is nothing in a trained
denoiser.

With c tokens per step (`tokens_per_view`) rollouts and scores are c times cheaper, and the c tokens of a step are
scored given what is before the first of them, which is how they were drawn: still exact.

On a model that denoises block by block a completion is written from left to right within its blocks, and view k can be
the state before token k of every block at once (`within="block"`, the default there): with blocks of b tokens b views
in place of L, with the same scores. It is what Nemotron-Labs-Diffusion announced as a fast JustGRPO; no code of it is
public, and the construction is ours.

Decided differently from the released code:
- It scores all tokens of the canvas and divides by its length; `scope="canvas"` and `loss_type="dr_grpo"` do that. The
  default is the valid tokens, and TRL's mean over all tokens of a generation batch.
- It divides by the number of completions whose advantage is not zero; here by that of all of them.
- It makes one pass over a batch, so that its ratio is always 1; here `num_iterations` may be larger, with ratios to the
  policy that wrote the completions.
- It attends to padding; here padding is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.likelihood.left_to_right import WITHIN, LeftToRight
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer

SCHEDULE = "left_to_right"
_OFF = {
    "top_p": 1.0,
    "top_k": 0,
    "cache": "none",
    "min_new_tokens": 0,
    "eos_penalty": 0.0,
    "suppress_token_ids": None,
    "defer_token_ids": None,
}
"""Settings of the rollout that scores do not know of, and the values at which they do nothing."""


@dataclass
class JustGRPOConfig(DiffusionPolicyConfig):
    """Settings of JustGRPO; the defaults are the paper's, but for sizes and optimizer,
    which are TRL's here and the paper's in the configuration files.

    Args:
        tokens_per_view: c, tokens that a step of the rollout writes and a view scores; divides canvas and blocks.
        within: what views count tokens in, `"canvas"` or `"block"`; None: `"block"` for models that denoise block by
            block, else `"canvas"`.
        schedule: `"left_to_right"`; scores would not be those of completions that are written in another order.
        denoising_steps: None, or what c asks for: the canvas over c.
        one_view: on, since there are as many views as steps.
        temperature: of the rollout; scores are computed at the same one, `score_temperature`.
        epsilon: clip range, which acts from the second pass over a batch on. beta: weight of the KL term.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    tokens_per_view: int = field(
        default=1, metadata={"help": "Tokens that a step of the rollout writes, and that a view scores."}
    )
    within: str | None = field(
        default=None,
        metadata={"help": "What views count tokens in: canvas or block. Default: block where attention has blocks."},
    )
    schedule: str = field(default=SCHEDULE, metadata={"help": "Decoding schedule: left_to_right."})
    one_view: bool = field(
        default=True,
        metadata={"help": "Score the views of a completion one after another: less memory, one forward more."},
    )

    def __post_init__(self) -> None:
        if self.schedule != SCHEDULE:
            raise ValueError(f"schedule={self.schedule!r} is not allowed; JustGRPO decodes with {SCHEDULE}")
        self.estimator()
        check_choice("within", self.within or "canvas", WITHIN)
        for name in ("max_completion_length", "block_length"):
            value = getattr(self, name)
            if value is not None and value % self.tokens_per_view:
                raise ValueError(
                    f"tokens_per_view={self.tokens_per_view} is not allowed; it must divide {name}={value}"
                )
        if self.max_completion_length is not None:
            steps = self.max_completion_length // self.tokens_per_view
            if self.denoising_steps not in (None, steps):
                raise ValueError(
                    f"denoising_steps={self.denoising_steps} is not allowed; {self.tokens_per_view} tokens per step "
                    f"(tokens_per_view) are {steps} steps"
                )
            self.denoising_steps = steps
        super().__post_init__()
        if not self.disable_dropout:
            raise ValueError(
                "disable_dropout=False is not allowed: JustGRPO's scores are the probabilities that tokens were drawn "
                "with, and dropout would change them; needed: True"
            )
        for name, off in _OFF.items():
            value = getattr(self, name)
            if name == "cache" and (value == "auto" or self.rollout_correction != "none"):
                continue  # "auto" is exact
            if value and value != off:
                raise ValueError(
                    f"{name}={value!r} is not allowed: JustGRPO's scores are the probabilities that tokens were drawn "
                    f"with, and know nothing of it; needed: {off!r}"
                    + (", 'auto', or a rollout_correction" if name == "cache" else "")
                )
        if self.temperature != self.score_temperature:
            raise ValueError(
                f"temperature={self.temperature} is not allowed with score_temperature={self.score_temperature}: "
                "JustGRPO's scores are the probabilities that tokens were drawn with; set both to the same"
            )

    def estimator(self, spec: DiffusionSpec | None = None) -> LeftToRight:
        """The estimator that these settings describe, for a model if given; ValueError where they describe none."""
        blocks = spec is not None and spec.attention in BLOCK_KINDS
        if blocks and spec is not None and spec.grid_origin == "position_zero" and self.tokens_per_view > 1:
            raise ValueError(
                f"tokens_per_view={self.tokens_per_view} is not allowed for a model whose blocks begin at position 0: "
                "prompts end inside of them, and the rest is not written in steps of as many tokens; allowed: 1"
            )
        if spec is None or self.within == "canvas" or (self.within is None and not blocks):
            return LeftToRight(self.tokens_per_view, self.scope)
        if not blocks:
            raise ValueError(
                f"within='block' is not allowed for a model with attention={spec.attention!r}, which would see later "
                "blocks; allowed: 'canvas'"
            )
        return LeftToRight(self.tokens_per_view, self.scope, "block", spec.block_length, spec.grid_origin)


class JustGRPOTrainer(DiffusionPolicyTrainer):
    """JustGRPO in TRL's GRPO loop; `JustGRPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = JustGRPOConfig
    args: JustGRPOConfig
    needs_masks = (
        "its scores are those of tokens that are written once, from left to right; where tokens are refined all at "
        "once, the likelihood of a trajectory is another one"
    )
    _tag_names = ["trl", "rl4dlm", "justgrpo"]  # noqa: RUF012  (TRL's own form)
    _name = "JustGRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "The Flexibility Trap: Why Arbitrary Order Limits Reasoning Potential in Diffusion Language Models",
        "id": "2601.15165",
    }

    def build_estimator(self) -> LeftToRight:
        """One view per step of the rollout, or per step of a block."""
        return self.args.estimator(self.spec)

    def _check_intervention(self) -> None:
        raise ValueError(
            f"intervention={type(self.intervention).__name__} is not allowed: JustGRPO scores a token with all that is "
            "behind it hidden, but it was drawn with given slots there; needed: None"
        )
