"""GDSD: the policy's own scores, moved by advantages, are its teacher (arXiv 2605.29398).

The optimum of the rewards with a reverse KL to the old policy is p_old exp(psi' A), up to a constant that centred
advantages absorb. No likelihood is estimated: on masked copies of a completion the scores of its tokens shall have
changed by the advantage. With s(i) the score of token i in a view, D the weighted sum of s(i) - s_old(i) over a pair of
complementary views, n the number of tokens and A = r - mean of the others' r, the loss of a completion is

    mean over pairs of  L(D / n - psi A)  +  beta / (2 n) (S - S_ref)^2,      S the pair's weighted sum,

L(r) = r^2, or Huber's: r^2 up to a residual c and 2 c |r| - c^2 beyond, whose pull towards the target is bounded and
never vanishes. With `unit="token"` it is the mean over tokens of L(s(i) - s_old(i) - psi A) instead. Where the policy
is the old one, the loss is psi^2 A^2 and its gradient -(2 psi / n) A grad D: that of REINFORCE on D. Later passes
are driven by the gap that is left, on both sides: a completion below the baseline has a finite target, too.

Scores (`target`) are log-probabilities, or with `"centred_logit"` logits minus their mean over the vocabulary, without
a softmax: token logits centralisation (TLC), as the paper's words have it. Their gradient adds up to zero over the
vocabulary. Weights of a pair are `"flat"`, one half for every token, or those of the evidence lower bound (`"elbo"`).

Decided differently from the released code:
- There, D is clamped to log(1 -+ epsilon) with epsilon = 4e-4: as soon as a sum over 256 tokens leaves that range, its
  gradient is zero for good, in both directions, so that later passes train next to nothing and psi A is never
  approached. `residual="clamped"` is that form, to reproduce it; published settings go with it.
- TLC there subtracts a constant mean before a softmax, which changes neither value nor gradient; what differs from GDSD
  are ESPO's weights: `weights="elbo", target="log_prob"` here.
- Losses of pairs are averaged here and added up there.
- The code's number of hidden tokens is drawn as ESPO's is; see `rl4dlm.algorithms.espo`.
- The code noises and scores the whole canvas without an attention mask; padding is hidden here, and
  `scope="valid"` is offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import SCOPES, Estimator
from rl4dlm.likelihood.flat_pairs import FlatPairs
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.models.reductions import SCORES
from rl4dlm.training.advantages import BASELINES, above_baseline, check_baseline
from rl4dlm.training.config import set_but_not_supported
from rl4dlm.training.losses import kl_estimate
from rl4dlm.training.sequence_ratio import SequenceRatioConfig
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyTrainer, PolicyScores

__all__ = ["GDSDConfig", "GDSDTrainer"]

WEIGHTS = ("flat", "elbo")
RESIDUALS = ("square", "huber", "clamped")
UNITS = ("sequence", "token")
_NO_RATIO = "the loss is a residual, not a ratio"


@dataclass
class GDSDConfig(SequenceRatioConfig):
    """Settings of GDSD.

    Args:
        psi: what advantages are multiplied by to be the wanted change of a completion's mean score.
        target: what a token's score is: `"log_prob"`, or `"centred_logit"` for TLC.
        weights: of a pair's tokens: `"flat"`, or `"elbo"`.
        form: how many tokens a view hides with `weights="elbo"`: `"count_with_zero"`, 0 to n, as published, or
            `"count"`, 1 to n; see `rl4dlm.likelihood.elbo`.
        unit: what has a residual: a completion (`"sequence"`) or each `"token"`.
        residual: `"square"`, `"huber"`, or `"clamped"`, as in the released code.
        residual_limit: c of `"huber"`.
        epsilon, epsilon_high: of `"clamped"`: D is clamped to log(1 - epsilon) and log(1 + epsilon_high).
        num_views: views per completion: 4 are two pairs.
        scope: the whole `"canvas"`, as published, or its `"valid"` tokens.
        stop_at_eos: off, as for scope `"canvas"` it must be.
        baseline: `"leave_one_out"`, as published, or `"group_mean"`.
        num_iterations: mu, passes over a batch of completions, each with views of its own.
        beta: weight of the KL term; 0 needs no reference model.
        block_length: 32.
        learning_rate: of AdamW.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    paper_block_length: ClassVar[int | None] = 32
    psi: float = field(default=1.0, metadata={"help": "Advantages times psi are the wanted change of mean scores."})
    target: str = field(
        default="log_prob",
        metadata={"help": f"What the score of a token is: {', '.join(SCORES)}.", "choices": list(SCORES)},
    )
    weights: str = field(
        default="flat",
        metadata={"help": f"What tokens of a pair of views count: {', '.join(WEIGHTS)}.", "choices": list(WEIGHTS)},
    )
    form: str = field(
        default="count_with_zero",
        metadata={
            "help": "How many tokens views hide with weights=elbo: count_with_zero or count.",
            "choices": ["count_with_zero", "count"],
        },
    )
    unit: str = field(
        default="sequence",
        metadata={"help": f"What has a residual: {', '.join(UNITS)}.", "choices": list(UNITS)},
    )
    residual: str = field(
        default="square",
        metadata={"help": f"What becomes of residuals: {', '.join(RESIDUALS)}.", "choices": list(RESIDUALS)},
    )
    residual_limit: float = field(default=1.0, metadata={"help": "Where Huber's residual becomes linear."})
    epsilon: float = field(default=4e-4, metadata={"help": "Range of changes with residual=clamped."})
    num_views: int = field(default=4, metadata={"help": "Views per completion and pass, in complementary pairs."})
    scope: str = field(
        default="canvas",
        metadata={"help": "Tokens that are noised and scored: valid or canvas.", "choices": list(SCOPES)},
    )
    stop_at_eos: bool = field(
        default=False, metadata={"help": "Stop a row at its end; not with scope=canvas, which scores what follows."}
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={"help": "What rewards are compared with: group_mean or leave_one_out.", "choices": list(BASELINES)},
    )
    num_iterations: int = field(default=8, metadata={"help": "Passes over a batch of completions (mu)."})
    beta: float = field(default=1e-3, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of AdamW, the paper's."})

    def __post_init__(self) -> None:
        refused = dict.fromkeys(("clip", "self_normalize", "delta"), _NO_RATIO)
        if self.residual != "clamped":
            refused |= dict.fromkeys(("epsilon", "epsilon_high"), f"it has no effect with residual={self.residual!r}")
        if self.residual != "huber":
            refused["residual_limit"] = f"it has no effect with residual={self.residual!r}"
        if self.weights == "flat":
            refused["form"] = "it has no effect with weights='flat'"
        said = set_but_not_supported(self, refused)
        if said:
            raise ValueError("; ".join(said))
        super().__post_init__()
        check_choice("target", self.target, SCORES)
        check_choice("weights", self.weights, WEIGHTS)
        check_choice("unit", self.unit, UNITS)
        check_choice("residual", self.residual, RESIDUALS)
        check_choice("form", self.form, ("count_with_zero", "count"))
        for name in ("psi", "residual_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be larger than 0")
        if self.residual == "clamped" and self.unit != "sequence":
            raise ValueError("residual='clamped' is not allowed with unit='token': it is one of sums; choose sequence")
        if self.beta and self.target != "log_prob":
            raise ValueError(
                f"beta={self.beta} is not allowed with target={self.target!r}: differences of centred logits are no "
                "estimate of a KL divergence; set it to 0"
            )
        check_baseline(self)
        self.estimator()

    def estimator(self) -> ELBO:
        """The pairs of views."""
        if self.weights == "flat":
            return FlatPairs(self.num_views, stratify="rows", scope=self.scope)
        return ELBO(self.num_views, self.form, complement=True, stratify="rows", scope=self.scope)


class GDSDTrainer(DiffusionPolicyTrainer):
    """GDSD in TRL's GRPO loop; `GDSDConfig` has its settings, the module's docstring the algorithm."""

    config_class = GDSDConfig
    args: GDSDConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "gdsd"]  # noqa: RUF012  (TRL's own form)
    _name = "GDSD"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "GDSD: Reinforcement Learning as Guided Denoiser Self-Distillation for Diffusion Language Models",
        "id": "2605.29398",
    }

    @property
    def score_of(self) -> str:  # type: ignore[override]
        """Log-probabilities or centred logits."""
        return self.args.target

    def build_estimator(self) -> Estimator:
        """Pairs of complementary views."""
        return of_noise(self.model, self.args.estimator())

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Rewards above the baseline. Notes which completions have one: others have no target, and not one of 0."""
        start = self.accelerator.process_index * len(batch["advantages"])
        batch["graded"] = ~rewards.flatten()[start : start + len(batch["advantages"])].isnan()
        return above_baseline(rewards, self.args.baseline, self.args.scale_rewards)

    def compared(self, scores: PolicyScores) -> Tensor:
        """Scores in each view, `[B, K, L]`: pairs have targets of their own."""
        assert scores.view_log_probs is not None
        return scores.view_log_probs

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """Centred logits are compared with no log-probability."""
        where = None if self.args.target == "log_prob" else torch.zeros_like(scores.log_probs, dtype=torch.bool)
        return scores.log_probs, where

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """Of the completions of a micro-batch; see the module's docstring."""
        args, mask, views = self.args, batch["completion_mask"], scores.views
        assert views is not None
        count, length = views.weight.shape[1], mask.sum(-1).clamp(min=1)[:, None]
        weight = views.weight.to(self.compared(scores).dtype) * count  # of a view's own estimate
        change = self.log_ratio_to("old", self.compared(scores), batch)
        target = args.psi * batch["advantages"][:, None]
        pairs = _pairs((weight * change).sum(-1)) / length  # D / n, [B, K / 2]
        if args.unit == "token":
            apart = self._penalty(change - target[..., None]) * weight
            share = 0.5 if args.weights == "flat" else 1.0  # what a pair's weights add up to, over n
            each = apart.sum((1, 2)) / (share * count * length[:, 0])
        else:
            moved = pairs
            if args.residual == "clamped":
                high = args.epsilon if args.epsilon_high is None else args.epsilon_high
                moved = (pairs * length).clamp(math.log(1 - args.epsilon), math.log(1 + high)) / length
            each = self._penalty(moved - target).mean(-1)
        counts = mask.any(-1)
        graded = counts & batch["graded"] if "graded" in batch else counts
        each = each * graded
        if args.beta:
            apart = self.log_ratio_to(args.kl_target, self.compared(scores), batch)
            kl = kl_estimate(_pairs((weight * apart).sum(-1)), args.kl_estimator).mean(-1) / length[:, 0]
            each = each + args.beta * kl
            self.log_mean("kl", kl, counts)
        self.log_mean("gdsd/change", pairs.mean(-1), counts)
        self.log_mean("gdsd/residual", (pairs - target).abs().mean(-1), graded)
        self.log_entropy(scores, mask)
        return self.mean_over_rows(each * counts)

    def _penalty(self, residual: Tensor) -> Tensor:
        if self.args.residual != "huber":
            return residual.square()
        limit = self.args.residual_limit
        inside = residual.abs().clamp(max=limit)
        return inside.square() + 2 * limit * (residual.abs() - inside)


def _pairs(each: Tensor) -> Tensor:
    """Means `[B, K / 2]` of the two views of a pair, from `[B, K]`."""
    return each.unflatten(1, (-1, 2)).mean(-1)
