"""Distribution matching policy optimization: fit the reward-tilted distribution (DMPO, arXiv 2510.08233).

The target is p*(y) ~ p_ref(y) exp(r(y) / alpha), of which the completions of a prompt, drawn from p_old, are weighted
samples. With R_i = log p_ref(y_i) - log p_old(y_i), a softmax over the group, and S(y) an estimate of log p_theta(y)
from K views (complementary pairs, `rl4dlm.likelihood.elbo`) over n tokens,

    w+_i = softmax_i(kappa (R_i + r_i / alpha))
    w_i  = w+_i - s b_i
    loss = -sum_i w_i S(y_i) / n                     over a group; the mean over groups

which is a weighted denoising cross-entropy. The baseline b (strength s) is what the optimum would keep of completions
that are no better than others:

    negative    softmax_i(kappa (R_i - r_i / alpha))
    mean        1 / G
    unbiased    softmax_i(log p_theta(y_i) - log p_old(y_i)), with p_theta from the loss's own views: the importance
                weights of p_theta, under which the expected score is zero
    none        0

Weights are constants. They are computed once per batch of completions, p_old and p_ref in the same views; every pass
has new views of p_theta. There is no policy ratio, no clipping, no KL term.

`objective="ddo"` is the experimental alternative of the released code. With d_i = S(y_i) - log p_old(y_i),

    loss = -mean_i (w_i log sigmoid(c d_i) + a log sigmoid(-c d_i))

over all completions; with `ddo_split`, the two terms have views of their own.

`beta` is the share of R in the exponents. 1 is DMPO; 0 is the target p_old exp(r / alpha), which needs no reference
model and no scores of p_old, and is wd1's with psi = kappa / alpha.

Decided differently from the released code: all weights are of whole groups, where "mean" and "unbiased" take the rows
of one process there; the loss is the mean over groups, not the sum over the rows of a device; scope `"valid"` replaces
an option that leaves out other rows than it means; alternatives' terms are averages over views, which the code adds up
without `ddo_split`; scores have no dropout. Its decoding in random order with exact path likelihoods is not offered:
bounds serve all rollouts. Its alpha = 0 is `beta=0, alpha=1` here. The kappa that reaches a given effective sample size
is not looked for; `kappa` is a constant.

Completions without a reward, and truncated ones where those are left out, are in no term of the loss and have no share
in the softmax of "unbiased". Tokens that were given are in no score and not in n.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from torch.nn.functional import logsigmoid

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import SCOPES, Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.advantages import softmax_weights
from rl4dlm.training.interventions.trainer import places
from rl4dlm.training.losses import weighted_likelihood
from rl4dlm.training.ratio_free import RATIO_SETTINGS, RatioFreeConfig
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyTrainer, PolicyScores, rows_of

__all__ = ["DMPOConfig", "DMPOTrainer"]

BASELINES = ("negative", "mean", "unbiased", "none")
OBJECTIVES = ("cross_entropy", "ddo")
FORMS = ("bernoulli_count", "count")
_NO_KL = "there is no KL term; beta is a share in the weights"


@dataclass
class DMPOConfig(RatioFreeConfig):
    """Settings of `DMPOTrainer`: those of `DiffusionPolicyConfig`, with DMPO's own.

    Args:
        alpha: temperature of the target; rewards are divided by it.
        kappa: exponents are multiplied by it; below 1, a step towards the target.
        beta: share of log p_ref - log p_old in the exponents; 0 needs no reference model.
        weight_baseline: what is subtracted from weights: `"negative"`, `"mean"`, `"unbiased"` or `"none"`.
        weight_baseline_strength: s.
        num_views: K, in the loss and in log p_ref - log p_old; even.
        level_range: share of the canvas that a view hides, before complements.
        form: `"bernoulli_count"`, tokens hidden independently, as published, or `"count"`, a fixed number of them,
            whose pairs estimate exponents with less noise; see `rl4dlm.likelihood.elbo`.
        objective: `"cross_entropy"` or `"ddo"`.
        ddo_scale, ddo_negative_weight, ddo_split: c, a, and whether both terms have views of their own.
        scope: the whole `"canvas"`, as published, or its `"valid"` tokens.
        stop_at_eos: off, as for scope `"canvas"` it must be.
        num_iterations: passes over a batch of completions (mu), each with views of its own.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    alpha: float = field(default=0.04, metadata={"help": "Temperature of the target: rewards are divided by it."})
    kappa: float = field(default=1.0, metadata={"help": "Factor of the exponents of weights, in (0, 1]."})
    beta: float = field(
        default=1.0, metadata={"help": "Share of the log-ratio of reference and old policy in the weights; 0: none."}
    )
    weight_baseline: str = field(
        default="negative",
        metadata={"help": f"What is subtracted from weights: {', '.join(BASELINES)}.", "choices": list(BASELINES)},
    )
    weight_baseline_strength: float = field(default=1.0, metadata={"help": "Factor of what is subtracted."})
    num_views: int = field(default=4, metadata={"help": "Views per completion and pass; even."})
    level_range: list[float] = field(
        default_factory=lambda: [0.1, 1.0],
        metadata={"help": "Range of the share of the canvas that a view hides."},
    )
    form: str = field(
        default="bernoulli_count",
        metadata={"help": f"How tokens of a view are hidden: {', '.join(FORMS)}.", "choices": list(FORMS)},
    )
    objective: str = field(
        default="cross_entropy",
        metadata={"help": f"The loss: {', '.join(OBJECTIVES)}.", "choices": list(OBJECTIVES)},
    )
    ddo_scale: float = field(default=0.05, metadata={"help": "Factor of log-ratios in objective=ddo."})
    ddo_negative_weight: float = field(default=1.0, metadata={"help": "Weight of the second term of objective=ddo."})
    ddo_split: bool = field(default=False, metadata={"help": "Whether both terms of objective=ddo have own views."})
    scope: str = field(
        default="canvas",
        metadata={"help": "Tokens that are noised and scored: valid or canvas.", "choices": list(SCOPES)},
    )
    stop_at_eos: bool = field(
        default=False, metadata={"help": "Stop a row at its end; not with scope=canvas, which scores what follows."}
    )
    num_iterations: int = field(default=8, metadata={"help": "Passes over a batch of completions (mu)."})
    temperature: float = field(default=0.2, metadata={"help": "Temperature of the rollout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weight_baseline", self.weight_baseline, BASELINES)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("form", self.form, FORMS)
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} is not allowed; it must be larger than 0")
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa={self.kappa} is not allowed; it must be larger than 0 and at most 1")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} is not allowed; it must be between 0 and 1")
        if self.objective == "ddo" and self.weight_baseline != "none":
            raise ValueError(
                f"weight_baseline={self.weight_baseline!r} is not allowed with objective='ddo', whose second term "
                "takes its place; set it to none"
            )
        if self.weight_baseline == "unbiased" and self.steps_per_generation != 1:
            raise ValueError(
                "weight_baseline='unbiased' compares the completions of a group under the current policy, so that a "
                "step must see all of them; set gradient_accumulation_steps and steps_per_generation to 1 (is "
                f"{self.steps_per_generation})"
            )
        self.estimator()

    def refused_settings(self) -> dict[str, str]:
        """Those of policy ratios, scales and normalisations of rewards, and DMPO's own that others leave idle."""
        refused = {
            **RATIO_SETTINGS,
            "negative_advantage_weight": "weight_baseline says what becomes of completions below the baseline",
            "kl_estimator": _NO_KL,
            "kl_target": _NO_KL,
            "use_bias_correction_kl": _NO_KL,
            "scale_rewards": "weights are a softmax of rewards; set alpha",
            "multi_objective_aggregation": "weights are a softmax of the weighted sum of rewards; set reward_weights",
        }
        if self.objective != "ddo":
            idle = ("ddo_scale", "ddo_negative_weight", "ddo_split")
            refused |= dict.fromkeys(idle, f"it has no effect with objective={self.objective!r}")
        if self.weight_baseline == "none":
            refused["weight_baseline_strength"] = "it has no effect with weight_baseline='none'"
        if not self.beta:
            refused["sync_ref_model"] = "there is no reference model with beta=0"
        return refused

    def estimator(self) -> ELBO:
        """The views, in complementary pairs."""
        return ELBO(
            num_views=self.num_views,
            form=self.form,
            complement=True,
            stratify="none",
            level_range=tuple(self.level_range),  # type: ignore[arg-type]
            scope=self.scope,
        )


class DMPOTrainer(DiffusionPolicyTrainer):
    """DMPO in TRL's GRPO loop; `DMPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = DMPOConfig
    args: DMPOConfig
    per_iteration = ()
    _tag_names = ["trl", "rl4dlm", "dmpo"]  # noqa: RUF012  (TRL's own form)
    _name = "DMPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Enhancing Reasoning for Diffusion LLMs via Distribution Matching Policy Optimization",
        "id": "2510.08233",
    }

    def build_estimator(self) -> Estimator:
        """The views, in complementary pairs."""
        return of_noise(self.model, self.args.estimator())

    def _score_fixed_policies(self, batch: dict[str, Any], iterations: int) -> None:
        """Sequences' scores `[B]` by both policies, in views that no pass of the loss has."""
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            batch.pop(name, None)
        args = self.args
        if not (args.beta or args.weight_baseline == "unbiased" or args.objective == "ddo"):
            return
        rows, width = rows_of(batch), batch["completion_ids"].shape[1]
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size

        def score(model: Any) -> Tensor:
            scores = self._score(model, rows, self.num_iterations, width, rows_per_forward=size)
            return scores.log_probs.double().sum(-1)

        with torch.no_grad(), grpo.disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            batch["old_scores"] = score(self.model)
            if args.beta:
                with self._reference() as reference:
                    batch["ref_scores"] = score(reference)

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """Weights, less the baseline where that is a constant; also notes which completions have a reward."""
        start = self.accelerator.process_index * len(batch["advantages"])
        batch["rewarded"] = ~rewards.flatten()[start : start + len(batch["advantages"])].isnan()
        log_ratio = torch.zeros_like(rewards)
        if "ref_scores" in batch:
            log_ratio = self.of_all_processes(batch["ref_scores"] - batch["old_scores"])
        args = self.args
        target = {"alpha": args.alpha, "kappa": args.kappa, "beta": args.beta}
        positive = target_weights(rewards, log_ratio, **target, baseline="none")
        strength = args.weight_baseline_strength
        weights = target_weights(rewards, log_ratio, **target, baseline=args.weight_baseline, strength=strength)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["dmpo/effective_sample_share"].append(effective_share(positive).mean().item())
        return weights

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with a weight, where the loss is linear in weights that do not depend on its scores."""
        others = self.args.objective == "ddo" or self.args.weight_baseline == "unbiased"
        return None if others else self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """Of the completions of a micro-batch, as a mean over groups."""
        counts = batch["completion_mask"].any(-1)  # false: left out because it was truncated
        if "rewarded" in batch:
            counts = counts & batch["rewarded"]
        views = scores.views
        assert scores.view_log_probs is not None and views is not None
        weighted = scores.view_log_probs * views.weight.to(scores.view_log_probs.dtype)
        each = weighted.sum(-1) * weighted.shape[1]  # [B, K], what each view says of the sequence
        self.log_entropy(scores, batch["completion_mask"])
        group = self.num_generations if self.model.training else self.num_generations_eval
        weights = batch["advantages"].double()
        if self.args.objective == "ddo":
            first, second = (each[:, 0::2], each[:, 1::2]) if self.args.ddo_split else (each, each)
            old, scale = batch["old_scores"], self.args.ddo_scale
            wanted = logsigmoid(scale * (first.mean(-1) - old))
            unwanted = logsigmoid(-scale * (second.mean(-1) - old))
            negative = self.args.ddo_negative_weight
            return self.mean_over_rows(-(weights * wanted + negative * unwanted) * counts)
        estimate = each.mean(-1)
        if self.args.weight_baseline == "unbiased":
            gain = estimate.detach().double() - batch["old_scores"]
            gain = gain.masked_fill(~counts, -torch.inf)
            importance = self._softmax_in_groups(gain, batch["row_ids"], group)
            weights = weights - self.args.weight_baseline_strength * importance
        size = self.tokens_scored(batch).clamp(min=1)
        return self.mean_over_rows(weighted_likelihood(estimate / size, weights) * counts) * group

    def _softmax_in_groups(self, values: Tensor, row_ids: Tensor, group: int) -> Tensor:
        """Softmax `[B]` over the members of each row's group, wherever in the batch they are; 0 where all are -inf."""
        order = places(self.accelerator.gather(row_ids)).argsort()
        grouped = self.accelerator.gather(values)[order].view(-1, group)
        everyone = grouped.softmax(-1).nan_to_num(nan=0.0).flatten()
        start = self.accelerator.process_index * len(values)
        return torch.empty_like(everyone).index_copy(0, order, everyone)[start : start + len(values)]


def target_weights(
    rewards: Tensor,
    log_ratio: Tensor,
    *,
    alpha: float,
    kappa: float = 1.0,
    beta: float = 1.0,
    baseline: str = "negative",
    strength: float = 1.0,
) -> Tensor:
    """`w+ - s b`, float64 `[N, G]`, for baselines that are constants; `"unbiased"` ones are the loss's.

    Args:
        rewards: `[N, G]`; completions with NaN have weight 0.
        log_ratio: log p_ref - log p_old, `[N, G]`.
        alpha, kappa, beta, baseline, strength: as in `DMPOConfig`.
    """
    tilt, shift = rewards.double() / alpha, beta * log_ratio.double()
    weights = softmax_weights(kappa * (shift + tilt))
    if baseline == "negative":
        return weights - strength * softmax_weights(kappa * (shift - tilt))
    if baseline == "mean":
        return weights - strength * softmax_weights(tilt * 0)
    return weights


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size over group size, `[N]`: 1 for equal weights, 1 / G if one of them has all."""
    return weights.sum(-1).square() / weights.square().sum(-1).clamp(min=1e-30) / weights.shape[-1]
