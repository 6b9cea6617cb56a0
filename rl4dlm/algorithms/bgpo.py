"""BGPO: a bound of the policy ratio that is a sum over views (arXiv 2510.11683).

With n views (`rl4dlm.likelihood.elbo`, masks of a fixed count), l_v the estimate that view v alone gives of a
completion's evidence lower bound, over its number of tokens (`bound_norm`), and d_v = l_v - l_v,old in the same view,
the ratio of policies is exp(mean_v d_v). Its exponential of a mean keeps all n forward passes alive until the backward
pass. BGPO replaces it by a lower bound of A times the ratio, which is a mean over views:

    b_v  = 1 + d_v         where A >= 0      exp(x) >= 1 + x
    b_v  = exp(d_v)        elsewhere         Jensen's inequality: exp(mean) <= mean of exp
    loss = mean_i mean_v -min(A_i b_v, clip(b_v, 1 - epsilon, 1 + epsilon_high) A_i)

At the policy that made the completions b_v = 1, and the gradient is that of A times the evidence lower bound. Where
A < 0, `delta` bounds the loss by delta |A| (dual clipping). A KL term, which the paper does without, is per view, too.
With `clip="unconditional"` no bound is needed: exp(d_v), the ratio of each view, is a constant weight of l_v. Tokens
that an intervention has given are in no bound and in no number of tokens.

`one_view=True` is what saves the memory here. It scores one view after another for every estimator and whatever is made
of the views, at the price of one more forward pass, so that bounds are not needed for that; they are BGPO's loss.

`bound_norm` says what bounds are divided by. The authors' code could not be had; its port in DARE (arXiv 2604.04215)
divides by the length of the canvas, `"canvas"`, so that all tokens weigh the same whatever completion they are in, with
`scope="valid"` or where all of the canvas is noised, `scope="canvas"`, whose tokens are the canvas anyway. The default,
`"tokens"`, are those in scope: completions weigh the same, and the tokens of short ones more.

Decided differently from the port: with A >= 0 the clipped value is 1 + d_v itself, whose logarithm it
takes, so that it needs 1 + d_v > 0 and this does not; the numbers of hidden tokens are spread over the views of a
completion; its losses can be averaged over tokens, so that long completions count for more, and here completions are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import STRATIFY, check_choice
from rl4dlm.training.clipping import ratio_surrogate
from rl4dlm.training.config import OWN_LOSS, DiffusionPolicyConfig, set_but_not_supported
from rl4dlm.training.losses import kl_estimate, ratio_bound
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyTrainer, PolicyScores

__all__ = ["BGPOConfig", "BGPOTrainer"]

BOUND_NORMS = ("tokens", "canvas")
_PER_VIEW = "the loss here is one clipped bound per view"
_NOT_SUPPORTED = {
    **OWN_LOSS,
    "loss_type": f"{_PER_VIEW}, averaged over views and completions: a loss of its own",
    "importance_sampling_level": f"{_PER_VIEW} of a whole sequence already",
    "off_policy_mask_threshold": f"{_PER_VIEW}; delta bounds it where the policy has moved far",
    "top_entropy_quantile": f"{_PER_VIEW}, not per token",
    "use_bias_correction_kl": "the KL term is per view, where a bound stands for the ratio that could correct it",
}


@dataclass
class BGPOConfig(DiffusionPolicyConfig):
    """Settings of `BGPOTrainer`: those of `DiffusionPolicyConfig`, with BGPO's own.

    Args:
        num_views: n, views per completion and pass.
        stratify: whether the numbers of hidden tokens are spread over the `"views"` of a completion, also over
            `"rows"`, or drawn one by one (`"none"`).
        complement: views come in pairs that hide complementary tokens, each with the expectation of a view by itself;
            `num_views` is even then.
        bound_norm: what bounds are divided by: the number of `"tokens"` of a completion that they are about, or the
            length of the `"canvas"`.
        epsilon, epsilon_high: clip range of a view's bound.
        delta: c > 1 + epsilon_high, bounds the loss of a view by c |A| where A < 0 (dual clip); None: not bounded.
        beta, kl_estimator: weight of a KL term per view, and its form: k2 or k3. k1 is refused, since its gradient does
            not depend on the reference.
        scale_rewards: TRL's: advantages are divided by the group's standard deviation.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_views: int = field(default=16, metadata={"help": "Views per completion and pass (n)."})
    stratify: str = field(
        default="views",
        metadata={
            "help": f"How counts of hidden tokens are spread: {', '.join(STRATIFY)}.",
            "choices": list(STRATIFY),
        },
    )
    complement: bool = field(default=False, metadata={"help": "Views come in pairs that hide complementary tokens."})
    bound_norm: str = field(
        default="tokens",
        metadata={
            "help": "What bounds are divided by: the completion's number of tokens, or the length of the canvas.",
            "choices": list(BOUND_NORMS),
        },
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    kl_per_token: ClassVar[bool] = False
    kl_estimator: str = field(
        default="k2", metadata={"help": "Form of the KL term: k2 or k3.", "choices": ["k2", "k3"]}
    )
    temperature: float = field(default=0.6, metadata={"help": "Temperature of the rollout."})

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        if refused:
            raise ValueError("; ".join(refused))
        super().__post_init__()
        check_choice("bound_norm", self.bound_norm, BOUND_NORMS)
        if self.clip == "log":
            raise ValueError(
                "clip='log' is not allowed: BGPO's bound of a ratio, which is clipped, may have no logarithm; choose "
                "ppo, unconditional or none"
            )
        self.estimator()

    def estimator(self) -> ELBO:
        """The views."""
        return ELBO(self.num_views, "count", self.complement, self.stratify, scope=self.scope)


class BGPOTrainer(DiffusionPolicyTrainer):
    """BGPO in TRL's GRPO loop; `BGPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = BGPOConfig
    args: BGPOConfig
    _tag_names = ["trl", "rl4dlm", "bgpo"]  # noqa: RUF012  (TRL's own form)
    _name = "BGPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Boundary-Guided Policy Optimization for Memory-efficient RL of Diffusion Large Language Models",
        "id": "2510.11683",
    }

    def build_estimator(self) -> Estimator:
        """The views."""
        return of_noise(self.model, self.args.estimator())

    def compared(self, scores: PolicyScores) -> Tensor:
        """What each view says of the sequence, `[B, K]`."""
        assert scores.view_log_probs is not None and scores.views is not None
        weight = scores.views.weight.to(scores.view_log_probs.dtype)
        return (scores.view_log_probs * weight).sum(-1) * weight.shape[1]

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage, unless there is a KL term."""
        return None if self.args.beta else self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The mean over completions and views."""
        size = self.tokens_scored(batch).clamp(min=1)[:, None]
        if self.args.bound_norm == "canvas":
            size = torch.full_like(size, batch["canvas_ids"].shape[1])
        each = self.compared(scores)  # [B, K]
        difference = self.log_ratio_to("old", each, batch) / size
        counts = batch["completion_mask"].any(-1)  # false: left out because it was truncated
        advantages = batch["advantages"][:, None]
        if self.clip.kind == "unconditional":
            log_ratio, values = difference, self.surrogate(difference, each / size, advantages, counts[:, None], batch)
        else:
            bound = ratio_bound(difference, advantages)
            log_ratio, values = bound.log(), ratio_surrogate(bound, advantages, self.clip)
        self.log_clipped(log_ratio, advantages, counts[:, None])
        if self.args.beta:
            other = self.log_ratio_to(self.args.kl_target, each, batch) / size
            divergence = kl_estimate(other, self.args.kl_estimator)
            values = values + self.args.beta * divergence
            self.log_mean("kl", divergence, counts[:, None].expand_as(divergence))
        self.log_entropy(scores, batch["completion_mask"])
        return self.mean_over_rows(values.mean(-1) * counts)
