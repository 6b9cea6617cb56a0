"""What losses are made of, beside or in addition to TRL's: averages, KL terms, and metrics.

Owns how values per token or per sequence become one number, under the names of TRL's `loss_type`, and which policy a KL
term is to. Formulas are in `rl4dlm.training.losses`. TRL's private names are used here, and checked when the file is
imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.views import Views
from rl4dlm.training.checkpoints import ResumableGRPOTrainer
from rl4dlm.training.config import DiffusionPolicyConfig
from rl4dlm.training.contract import check_contract
from rl4dlm.training.guard import GuardedTrainer
from rl4dlm.training.losses import kl_estimate

check_contract(
    GRPOTrainer,
    parameters={"_compute_loss": ["model", "inputs"]},
    attributes=[
        "_metrics", "importance_sampling_level", "loss_type", "max_completion_length", "num_generations",
        "num_generations_eval",
    ],
)  # fmt: skip


class PolicyScores(NamedTuple):
    """What a loss is computed from, per completion token; zero where nothing is scored."""

    log_probs: Tensor  # [B, C], what the estimator makes of the views
    entropies: Tensor  # [B, C], in nats, averaged over the views that score a token
    views: Views | None = None  # what was hidden; K views
    view_log_probs: Tensor | None = None  # [B, K, L], log-probabilities in each view
    values: Tensor | None = None  # [B, C], of a value model, where each token is scored in one view
    choices: Tensor | None = None  # [B, K, L], of an unmasking policy, log-probabilities of each token's place


class LossParts(GuardedTrainer, ResumableGRPOTrainer):
    """Averages, KL terms and metrics, for the `loss` of an algorithm."""

    args: DiffusionPolicyConfig
    estimator: Estimator
    scores_hints: bool

    @property
    def accumulation_steps(self) -> int:
        """How many micro-batches an optimizer step adds up; 1 in evaluation."""
        steps: int = self.current_gradient_accumulation_steps if self.model.training else 1
        return steps

    def of_all_processes(self, values: Tensor) -> Tensor:
        """`[N, G]`, from one number per completion of this process, `[B]`."""
        generations = self.num_generations if self.model.training else self.num_generations_eval
        gathered: Tensor = self.accelerator.gather(values.contiguous())
        return gathered.view(-1, generations)

    def tokens_scored(self, batch: dict[str, Any]) -> Tensor:
        """How many canvas tokens of each completion its scores are about, `[B]`: those in scope that were not given."""
        valid: Tensor = batch["canvas_valid"]
        within = torch.ones_like(valid) if self.estimator.scope == "canvas" else valid
        if batch.get("hinted") is not None and not self.scores_hints:
            within = within & ~batch["hinted"]
        return within.sum(-1)

    def mean_over_rows(self, values: Tensor) -> Tensor:
        """The mean of one number per row, `[B]`, scaled for gradient accumulation; for losses of whole sequences."""
        return values.mean() / self.accumulation_steps

    def mean_over_tokens(
        self, values: Tensor, mask: Tensor, batch: dict[str, Any], total: Tensor | None = None
    ) -> Tensor:
        """The sum of `values` times `mask`, both `[B, C]`, over what `mask` adds up to in the generation batch.

        Scaled as TRL's `loss_type="dapo"`: splitting a batch into micro-batches or processes changes nothing. `total`
        is the denominator; None: `num_items_in_batch`, the completion tokens, and at least 1.
        """
        total = batch["num_items_in_batch"].clamp(min=1.0) if total is None else total
        share = self.accumulation_steps / self.args.steps_per_generation if self.model.training else 1.0
        return (values * mask).sum() / (total * share / self.accelerator.num_processes)

    def averaged(self, values: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """`values` `[B, C]` where `mask` is set, averaged as `loss_type` says and scaled for gradient accumulation.

        `"grpo"`, `"sapo"`: mean over the tokens of a row, then over rows. `"luspo"`: sum over the tokens, mean over
        rows. `"dr_grpo"`: sum over the longest possible completions of the micro-batch. `"bnpo"`: mean over its tokens.
        `"dapo"`, `"cispo"`, `"vespo"`: over the tokens of the generation batch, `mean_over_tokens`.
        """
        masked = values * mask
        if self.loss_type in ("grpo", "sapo"):
            return self.mean_over_rows(masked.sum(-1) / mask.sum(-1).clamp(min=1))
        if self.loss_type == "luspo":
            return self.mean_over_rows(masked.sum(-1))
        if self.loss_type == "dr_grpo":
            return self.mean_over_rows(masked.sum(-1) / self.max_completion_length)
        if self.loss_type == "bnpo":
            return masked.sum() / mask.sum().clamp(min=1) / self.accumulation_steps
        if self.loss_type in ("dapo", "cispo", "vespo"):
            return self.mean_over_tokens(values, mask, batch)
        raise ValueError(f"loss_type={self.loss_type!r} is not supported: how it averages is not known")

    def trl_loss(self, batch: dict[str, Any]) -> Tensor:
        """TRL's loss of a micro-batch, which asks for the scores that it is to use."""
        loss: Tensor = super()._compute_loss(self.model_wrapped, batch)
        return loss

    @property
    def kl_is_trls(self) -> bool:
        """Whether the KL term, if there is one, is that of TRL's losses: k3 to the reference."""
        corrected = self.args.use_bias_correction_kl and self.args.clip != "ppo"  # by a ratio that TRL does not see
        return (self.args.kl_target, self.args.kl_estimator) == ("reference", "k3") and not corrected

    def log_ratio_to(self, policy: str, current: Tensor, batch: dict[str, Any]) -> Tensor:
        """Log-ratios of the current policy to the `"old"` one or the `"reference"`, of the shape of `current`.

        Args:
            policy: the other one. Where a batch has no old scores, the current policy is the old one: zeros, whose
                gradient is that of `current`.
            current: scores as `compared` gives them: per token, or per view.
            batch: with the other policy's. KeyError where the reference's are needed and missing.
        """
        other = batch["ref_per_token_logps"] if policy == "reference" else batch.get("old_per_token_logps")
        return current - (current.detach() if other is None else other)

    def token_kl(self, log_probs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Estimates `[B, C]` of the KL divergence that `kl_estimator` and `kl_target` name, of each token's scores.

        With `use_bias_correction_kl` they are multiplied by the policy ratio, one per token or per sequence.
        """
        estimates = kl_estimate(self.log_ratio_to(self.args.kl_target, log_probs, batch), self.args.kl_estimator)
        if self.args.use_bias_correction_kl:
            log_ratio, mask = self.log_ratio_to("old", log_probs, batch), batch["completion_mask"]
            if self.importance_sampling_level == "sequence":
                log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
            estimates = estimates * log_ratio.exp()
        return estimates

    @torch.no_grad()
    def log_mean(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Logs the mean of `values`, weighted by `weights` of the same shape, over all processes; 0 without weights."""
        values = values if values.is_floating_point() else values.float()
        sums = torch.stack([(values * weights).sum(), weights.sum().to(values)])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"][name].append(total / count if count else 0.0)

    def with_advantage(self, batch: dict[str, Any]) -> Tensor:
        """bool `[B]`, the completions that have an advantage, and tokens that count."""
        found: Tensor = (batch["advantages"] != 0) & batch["completion_mask"].any(-1)
        return found

    def log_entropy(self, scores: PolicyScores, mask: Tensor) -> None:
        """Logs the mean `entropy` of the tokens of `mask` `[B, C]` that a view scores; TRL's own loss logs it, too."""
        counted = mask.bool()
        if scores.views is not None:
            counted = counted & resized(scores.views.scored.any(1), mask.shape[1])
        self.log_mean("entropy", scores.entropies, counted)


def resized(values: Tensor, width: int) -> Tensor:
    """`[B, L]` cut to, or padded with zeros to, `[B, width]`: TRL pads completions to their own longest."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
