"""LightningRL (arXiv 2603.13319): fewer forwards at equal accuracy, by rewards of speed that are normalised apart.

For each prompt, with z the normalisation to mean 0 and deviation 1, and TPF the tokens that a completion wrote per
forward,

    R_j = z(accuracy)_j + z(TPF)_j,                         A = R less its mean over the batch, over its deviation.

The likelihood is a mean field: all response tokens are hidden at once. On a model that denoises block by block, each
block is predicted from its hidden self given the finished ones before it. With rho = exp(s - s_old) of a token,

    loss = mean over completions of the mean over tokens of -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
           + beta * mean over tokens of KL(s, s_ref) + nll_weight * mean over tokens of right completions of -s.

Prompts without a right completion, and those whose completions do not differ in speed, are left out.

Decided differently from the released code:
- What is right is what `accuracy_reward` says. The code stores no such flag and takes a total reward of at least 0
  for it, so that its last term imitates wrong answers that are fast.
- A sum of normalised rewards pays a fast wrong answer more than a slow right one. `speed_gate="correct"`, the default,
  counts speed among right completions alone; `"none"` is the published sum.
- Speed is a reward function (`rewards/speed.py`): tokens written over forwards, those that commit a block and those of
  guidance included. The code counts distinct steps.
- `reward_weights` weigh both goals however they are normalised; the code has a coefficient of speed which its z-score
  ignores.
- Means are over the whole batch of completions, those of prompts that are left out included, so that splitting it
  changes nothing; the code has means of micro-batches. A mean over the tokens of a completion is one over those that
  are scored; the code counts tokens behind the end, too.
- Tokens behind the end are hidden; in the code they are shown.
- The grid of blocks is that of the model; the code counts from the start of the padded row. Its step map is loaded and
  not used. Its path with a value model is TraceRL's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.clipping import clipped_units
from rl4dlm.training.config import OWN_LOSS, set_but_not_supported
from rl4dlm.training.decoupled import ADVANTAGE_NORMS, NORMS, group_advantages, kept_groups, normalised
from rl4dlm.training.setup import mean_field, swapped
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer, PolicyScores

ACCURACY_NORMS = ("z_score", "sign")
GATES = ("correct", "none")
AVERAGES = {"token": "dapo", "sequence": "grpo"}
LOSS_TYPES = ("grpo", "dapo")
_FURTHEST = 10.0  # log-ratios beyond it have no gradient
_APART = "rewards are normalised apart; set speed_norm, accuracy_norm, advantage_norm and reward_weights"
_NOT_SUPPORTED = {
    **OWN_LOSS,
    "importance_sampling_level": "a ratio is one of a token",
    "scale_rewards": _APART,
    "multi_objective_aggregation": _APART,
}
for _name in ("loss_type", "use_bias_correction_kl"):  # the loss has them in its own way
    del _NOT_SUPPORTED[_name]


@dataclass
class LightningRLConfig(DiffusionPolicyConfig):
    """Settings of LightningRL: those of `DiffusionPolicyConfig`, with its own. The defaults are the paper's, but for
    the gate, sizes and optimizer, which are TRL's here and the paper's in the configuration files.

    Args:
        accuracy_reward: name of the reward function that says whether a completion is right. None: the only one
            beside that of speed.
        accuracy_from: its reward from which on a completion is right.
        speed_reward: name of the reward function of speed; the larger, the faster.
        speed_gate: `"correct"`, speed is compared and counts among right completions alone; `"none"`: among all, as
            published.
        speed_norm: `"z_score"`, `"min_max"` or `"none"`, of each prompt's completions. Reward functions beside the two
            have the same.
        accuracy_norm: `"z_score"`, or `"sign"`: 1 for right and -1 for wrong completions.
        advantage_norm: what becomes of the sum: less the mean of the `"batch"` and over its deviation, the same in each
            `"group"`, or less the group's mean (`"center"`).
        keep_wrong_groups: keep prompts without a right completion.
        min_speed_range: prompts whose completions differ less in speed are left out; 0: none are.
        cap_margin: completions that end so many tokens before the canvas does, or later, are wrong; None: they may be
            right.
        nll_weight: weight of the log-likelihood of right completions; 0: none.
        loss_type: how the clipped term is averaged: `"grpo"`, over the tokens of a completion, then over completions;
            `"dapo"`, over all tokens.
        kl_average, nll_average: the same for the other terms: over each `"token"`, or by `"sequence"`.
        epsilon, epsilon_high: clip range of a token's ratio. beta, kl_estimator: of the KL term per token.
        num_iterations: passes over a batch of completions.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    accuracy_reward: str | None = field(
        default=None, metadata={"help": "Reward function that says what is right. Default: the only one beside speed."}
    )
    accuracy_from: float = field(default=1.0, metadata={"help": "Its reward from which on a completion is right."})
    speed_reward: str = field(default="tokens_per_forward", metadata={"help": "Name of the reward function of speed."})
    speed_gate: str = field(
        default="correct",
        metadata={"help": "Completions whose speed counts: correct ones, or all (none).", "choices": list(GATES)},
    )
    speed_norm: str = field(
        default="z_score", metadata={"help": f"Scale of speed: {', '.join(NORMS)}.", "choices": list(NORMS)}
    )
    accuracy_norm: str = field(
        default="z_score",
        metadata={"help": f"Scale of accuracy: {', '.join(ACCURACY_NORMS)}.", "choices": list(ACCURACY_NORMS)},
    )
    advantage_norm: str = field(
        default="batch",
        metadata={"help": f"Scale of the sum: {', '.join(ADVANTAGE_NORMS)}.", "choices": list(ADVANTAGE_NORMS)},
    )
    keep_wrong_groups: bool = field(default=False, metadata={"help": "Keep prompts without a right completion."})
    min_speed_range: float = field(
        default=0.01, metadata={"help": "Leave out prompts whose completions differ less in speed."}
    )
    cap_margin: int | None = field(
        default=None, metadata={"help": "Completions within so many tokens of the canvas's end are wrong."}
    )
    nll_weight: float = field(default=0.1, metadata={"help": "Weight of the log-likelihood of right completions."})
    loss_type: str = field(
        default="grpo",
        metadata={"help": "How the clipped term is averaged: grpo or dapo.", "choices": list(LOSS_TYPES)},
    )
    kl_average: str = field(
        default="token", metadata={"help": "How the KL term is averaged: token or sequence.", "choices": list(AVERAGES)}
    )
    nll_average: str = field(
        default="token",
        metadata={"help": "How the log-likelihood is averaged: token or sequence.", "choices": list(AVERAGES)},
    )
    scale_rewards: str = field(default="none", metadata={"help": "Refused: rewards are normalised apart."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term; 0 needs no reference model."})

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        if refused:
            raise ValueError("; ".join(refused))
        super().__post_init__()
        for name, allowed in (
            ("speed_gate", GATES), ("speed_norm", NORMS), ("accuracy_norm", ACCURACY_NORMS),
            ("advantage_norm", ADVANTAGE_NORMS), ("loss_type", LOSS_TYPES), ("kl_average", tuple(AVERAGES)),
            ("nll_average", tuple(AVERAGES)),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), allowed)
        for name in ("min_speed_range", "nll_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be 0 or larger")
        if self.cap_margin is not None and self.cap_margin < 0:
            raise ValueError(f"cap_margin={self.cap_margin} is not allowed; it must be 0 or larger, or None")


class LightningRLTrainer(DiffusionPolicyTrainer):
    """LightningRL in TRL's GRPO loop; `LightningRLConfig` has its settings, the module's docstring the algorithm."""

    config_class = LightningRLConfig
    args: LightningRLConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "lightningrl"]  # noqa: RUF012  (TRL's own form)
    _name = "LightningRL"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "LightningRL: Breaking the Accuracy-Parallelism Trade-off of Block-wise dLLMs via Reinforcement "
        "Learning",
        "id": "2603.13319",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names, wanted = list(self.reward_func_names), self.args.accuracy_reward
        if self.args.speed_reward not in names:
            raise ValueError(
                f"speed_reward={self.args.speed_reward!r} is no reward function; choose one of {', '.join(names)}, or "
                "add speed:tokens_per_forward"
            )
        others = [name for name in names if name != self.args.speed_reward]
        if wanted is None and len(others) != 1:
            raise ValueError(
                f"accuracy_reward=None is not allowed with {len(others)} rewards beside that of speed; choose one "
                f"of {', '.join(others) or 'them after adding one'}"
            )
        self._accuracy = others[0] if wanted is None else wanted
        if self._accuracy not in others:
            raise ValueError(f"accuracy_reward={wanted!r} is no reward function; choose one of {', '.join(others)}")

    def build_estimator(self) -> Estimator:
        """All response tokens hidden, prompts shown."""
        return mean_field(self.model, 0.0, self.args.scope)

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """Those of the sum of normalised rewards; also notes which completions are right, and their tokens."""
        args, found = self.args, {name: self.rewards_of(name) for name in self.reward_func_names}
        accuracy, speed = found[self._accuracy], found[args.speed_reward]
        right = accuracy >= args.accuracy_from
        if args.cap_margin is not None:
            length = self.of_all_processes(batch["canvas_valid"].sum(-1)).to(right.device)
            right &= length < batch["canvas_valid"].shape[1] - args.cap_margin
        total = torch.zeros_like(accuracy, dtype=torch.float64)
        for name, weight in zip(self.reward_func_names, self.reward_weights.tolist(), strict=True):
            total += weight * self._normalised(name, found[name], right)
        kept = kept_groups(right | args.keep_wrong_groups, speed, args.min_speed_range)
        start, size = self.accelerator.process_index * len(batch["advantages"]), len(batch["advantages"])
        taught = (right & kept[:, None]).flatten()[start : start + size].to(batch["row_ids"].device)
        batch["correct"] = taught & batch["completion_mask"].any(-1)
        each = torch.stack([batch["completion_mask"].sum(-1), torch.ones_like(batch["row_ids"])], dim=1)
        batch["correct_total"] = self.accelerator.gather((each * batch["correct"][:, None]).sum(0, keepdim=True)).sum(0)
        batch["correct_total"] = batch["correct_total"].expand(size, -1).contiguous()  # tokens and rows, [B, 2]
        logged = self._metrics["train" if self.model.training else "eval"]
        logged["lightningrl/correct_share"].append(right.double().mean().item())
        logged["lightningrl/kept_group_share"].append(kept.double().mean().item())
        known = ~accuracy.isnan()
        return group_advantages(total, args.advantage_norm, kept, known).masked_fill(~known, torch.nan)

    def _normalised(self, name: str, rewards: Tensor, right: Tensor) -> Tensor:
        args = self.args
        if name == self._accuracy:
            known = ~rewards.isnan()
            if args.accuracy_norm == "sign":
                return torch.where(known, 2.0 * right - 1, 0.0)
            return normalised(right.double().masked_fill(~known, torch.nan), "z_score")
        gated = name == args.speed_reward and args.speed_gate == "correct"
        return normalised(rewards, args.speed_norm, right if gated else None)

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage, and right ones where these are imitated, unless there is a KL term."""
        if self.args.beta:
            return None
        counted = self.with_advantage(batch)
        return counted | batch["correct"] if self.args.nll_weight else counted

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The clipped term, the KL term and the likelihood of right completions."""
        args, mask, log_probs = self.args, batch["completion_mask"], scores.log_probs
        advantages = batch["advantages"][:, None]
        log_ratio = self.log_ratio_to("old", log_probs, batch).clamp(-_FURTHEST, _FURTHEST)
        loss = self.averaged(self.surrogate(log_ratio, log_probs, advantages, mask.bool(), batch), mask, batch)
        clipped = torch.stack(clipped_units(log_ratio.detach(), advantages, self.clip)).any(0)
        self.log_mean("clip_ratio/region_mean", clipped, mask)
        if args.beta:
            divergence = self.token_kl(log_probs, batch)
            with swapped(self, "loss_type", AVERAGES[args.kl_average]):
                loss = loss + args.beta * self.averaged(divergence, mask, batch)
            self.log_mean("kl", divergence, mask)
        if args.nll_weight:
            loss = loss + args.nll_weight * self._likelihood(log_probs, batch)
        self.log_entropy(scores, mask)
        return loss

    def _likelihood(self, log_probs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Minus the mean log-likelihood of the right completions of the generation batch; zero without any."""
        mask, right = batch["completion_mask"], batch["correct"][:, None]
        tokens, rows = batch["correct_total"][0].clamp(min=1)
        self.log_mean("lightningrl/nll", -log_probs.detach(), mask * right)
        if self.args.nll_average == "token":
            return self.mean_over_tokens(-log_probs, mask * right, batch, tokens)
        each = (log_probs * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        return self.mean_over_tokens(-each, right, batch, rows)
