"""The RL stage of Dream-Coder (arXiv 2509.01142): GRPO on complementary masks with context-adaptive weights.

In each of mu passes a completion has two views: one hides each token with probability t ~ U(0, 1), the other one
exactly the others, so that every token is scored once, with score s. With A = (r - mean) / std of the group, and
rho = exp(s - s_old), the loss is

    sum of w * -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) / sum of w,

where w is the token's context-adaptive weight in its view, sum over visible j of p (1 - p)^(|k - j| - 1) / 2. Groups
whose advantages are all the same are overwritten by random ones that teach something. The paper has no KL term; with
`beta` above 0 one per token is added to the surrogate.

Decided differently from the released code:
- Levels and masks are keyed by row and pass. The code draws one level and one mask for all rows of a worker, which
  `noise_per="process"` does, too, and seeds its sampler with the same numbers at every step, so that noise comes back.
- `loss_type="dapo"`, the default, divides by the weights of the whole generation batch, so that splitting it changes
  nothing; `"bnpo"` by those of a micro-batch, as the code does. With levels of their own, rows with hardly any or
  nearly all tokens hidden then count for less than others; `"grpo"` divides each row by its own weights, so that all
  rows count the same. With one level for all that is so within a micro-batch anyway. Without any visible token the loss
  is 0.
- Tokens behind the first end of sequence are hidden in every view and count for nothing. The code shows some of them,
  though it scores none. `scope="canvas"` shows and scores them.
- Groups are overwritten within a process, which needs whole groups there. Where no group teaches anything the
  gradient is zero; the code crashes.
- Without CART all tokens count 1. The code multiplies by 1/t, with tensors that do not fit.
- Advantages are TRL's, which adds 1e-4 to the standard deviation instead of 1e-6.
- Code rewards need a sandbox, which this library does not have yet: bring a reward function of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.complementary import Complementary, check_context, context_weights
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.likelihood.views import Views
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.training.clipping import clipped_units
from rl4dlm.training.config import OWN_LOSS, set_but_not_supported
from rl4dlm.training.interventions.trainer import SECOND_ATTEMPT
from rl4dlm.training.loss_parts import resized
from rl4dlm.training.setup import of_noise
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer, PolicyScores, rows_of

LOSS_TYPES = ("dapo", "bnpo", "grpo")
NOISE_PER = ("row", "process")
_SAME = 1e-6  # advantages that are no further apart are the same but for rounding
_WEIGHTED = "every token has a weight of its own"
_NOT_SUPPORTED = {
    **OWN_LOSS,
    "importance_sampling_level": f"{_WEIGHTED}, and so a ratio",
    "off_policy_mask_threshold": _WEIGHTED,
    "top_entropy_quantile": _WEIGHTED,
}
for _name in ("loss_type", "use_bias_correction_kl"):  # the loss has them in its own way
    del _NOT_SUPPORTED[_name]


@dataclass
class DreamCoderRLConfig(DiffusionPolicyConfig):
    """Settings of Dream-Coder's RL; the defaults are the paper's, but for sizes and optimizer,
    which are TRL's here and the paper's in the configuration files.

    Args:
        cart_p: p of the context-adaptive weights, in (0, 1]; None: every token counts 1.
        substitute_groups: overwrite groups whose advantages are all the same.
        num_iterations: mu, passes over a batch of completions, each with masks of its own.
        epsilon, epsilon_high: clip range. delta: c > 1 + epsilon_high, bounds the loss by c |A| where A < 0 (dual
            clip); None: off.
        beta: weight of a KL term per token. The paper has none.
        scale_rewards: `"group"`: advantages are divided by the group's standard deviation.
        noise_per: `"row"`, each completion has a level and masks of its own, or `"process"`, all completions of a
            process and generation batch have the same; replacements of an intervention have others.
        loss_type: what weights are added up over: `"dapo"`, the generation batch; `"bnpo"`, the micro-batch; `"grpo"`,
            the row. See the module.
        schedule: of the rollout: whole canvas, the most probable candidates first.
        temperature, top_p: of the rollout. The paper divides the logits of scores by the temperature too; set
            `score_temperature` where it is not 1.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    cart_p: float | None = field(
        default=0.1, metadata={"help": "p of the context-adaptive weights; None weights all tokens the same."}
    )
    substitute_groups: bool = field(
        default=True, metadata={"help": "Overwrite groups whose advantages are all the same by others."}
    )
    num_iterations: int = field(default=2, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio, downwards."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Clip range of the policy ratio, upwards."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    noise_per: str = field(
        default="row",
        metadata={"help": "What has a level and masks of its own: each row or process.", "choices": list(NOISE_PER)},
    )
    loss_type: str = field(default="dapo", metadata={"help": "What the loss is averaged over: dapo, bnpo or grpo."})
    schedule: str = field(
        default="dream_maskgit_plus",
        metadata={"help": "Name of the decoding schedule: which tokens are written when."},
    )
    num_generations: int | None = field(default=16, metadata={"help": "Completions of each prompt (G)."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Completions per device and micro-batch; a whole group."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the rollout."})
    top_p: float = field(default=0.95, metadata={"help": "Keep the smallest set of tokens with this probability."})

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        if refused:
            raise ValueError("; ".join(refused))
        super().__post_init__()
        check_context("cart_p", self.cart_p)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("noise_per", self.noise_per, NOISE_PER)
        Complementary(scope=self.scope)


class DreamCoderRLTrainer(DiffusionPolicyTrainer):
    """Dream-Coder's RL in TRL's loop; `DreamCoderRLConfig` has its settings, the module's docstring the algorithm."""

    config_class = DreamCoderRLConfig
    args: DreamCoderRLConfig
    advantages_read_scores = False
    per_iteration = (*DiffusionPolicyTrainer.per_iteration, "weight_total")
    _tag_names = ["trl", "rl4dlm", "dream-coder-rl"]  # noqa: RUF012  (TRL's own form)
    _name = "Dream-Coder RL"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Dream-Coder 7B: An Open Diffusion Language Model for Code",
        "id": "2509.01142",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if self.args.substitute_groups and rows % self.num_generations:
            raise ValueError(
                "substitute_groups=True needs whole groups on each process, but per_device_train_batch_size="
                f"{self.args.per_device_train_batch_size} x steps_per_generation={self.args.steps_per_generation} = "
                f"{rows} is no multiple of num_generations={self.num_generations}"
            )

    @property
    def needs_masks(self) -> str:  # type: ignore[override]
        """Context-adaptive weights go by what a view hides."""
        if self.args.cart_p is None:
            return ""
        return (
            f"cart_p={self.args.cart_p} weights tokens by which neighbours a view hides, and random tokens do not say "
            "it; allowed: None"
        )

    def build_estimator(self) -> Estimator:
        """One pair of complementary views."""
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        shared_by = rows if self.args.noise_per == "process" else None
        pair = Complementary(scope=self.args.scope, shared_by=shared_by, row_period=SECOND_ATTEMPT)
        return of_noise(self.model, pair)

    def prepare_batch(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Overwrites groups that teach nothing, and sums up what tokens count for in each pass."""
        if self.args.substitute_groups:
            self._substitute(batch, rewards)
        totals = []
        for iteration in range(self.num_iterations):
            views = self._draw(rows_of(batch), iteration)  # as the loss draws them, without what was given
            totals.append(self.accelerator.gather(self._weights(views, batch).sum()).sum())
        batch["weight_total"] = torch.stack(totals).expand(len(batch["canvas_ids"]), -1).contiguous()

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage, unless there is a KL term."""
        return None if self.args.beta else self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The weighted mean of clipped surrogates."""
        assert scores.views is not None
        weights = self._weights(scores.views, batch).to(scores.log_probs.dtype)
        log_ratio = self.log_ratio_to("old", scores.log_probs, batch)
        advantages, counts = batch["advantages"][:, None], weights > 0
        losses = self.surrogate(log_ratio, scores.log_probs, advantages, counts, batch)
        if self.args.beta:
            divergence = self.token_kl(scores.log_probs, batch)
            losses = losses + self.args.beta * divergence
            self.log_mean("kl", divergence, weights)
        clipped = torch.stack(clipped_units(log_ratio.detach(), advantages, self.clip)).any(0)
        self.log_mean("clip_ratio/region_mean", clipped, weights)
        self.log_mean("entropy", scores.entropies, counts)
        # Without any weight, nothing was visible next to what was hidden, and the sum is zero too.
        if self.args.loss_type == "dapo" and "weight_total" in batch:
            total = batch["weight_total"][0].to(losses.dtype)
            return self.mean_over_tokens(losses, weights, batch, total.where(total > 0, 1.0))
        if self.args.loss_type == "grpo":
            total = weights.sum(-1)
            return self.mean_over_rows((losses * weights).sum(-1) / total.where(total > 0, 1.0))
        total = weights.sum() * self.accumulation_steps
        return (losses * weights).sum() / total.where(total > 0, 1.0)

    def _weights(self, views: Views, batch: dict[str, Any]) -> Tensor:
        """What tokens count for, float64 `[B, C]`: context-adaptive in the view that hides them, zero outside the loss.

        Neighbours are those within the completion that the view shows, given ones too.
        """
        within = batch["canvas_valid"][:, None]
        if self.args.scope == "canvas":
            within = torch.ones_like(within)
        weights = views.scored.double()
        if self.args.cart_p is not None:
            hidden = views.hidden[..., -weights.shape[-1] :]  # also what is not scored since it was given
            weights = weights * context_weights(within & ~hidden, self.args.cart_p)
        mask = batch["completion_mask"]
        return resized(weights.sum(1), mask.shape[1]) * mask

    def _substitute(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Groups of this process that teach nothing become copies of random ones that do, rows in their order."""
        size = self.num_generations
        rows = len(batch["canvas_ids"])
        first = self.accelerator.process_index * rows // size
        unknown = rewards[first : first + rows // size].isnan()
        # Not rewards: if each of several is normalised by itself, their sums may be equal where advantages are not.
        here = batch["advantages"].view(-1, size)
        spread = here.masked_fill(unknown, -torch.inf).amax(1) - here.masked_fill(unknown, torch.inf).amin(1)
        useful = (spread > _SAME).nonzero().squeeze(-1)
        dull = (~(spread > _SAME)).nonzero().squeeze(-1)
        self._metrics["train"]["substituted_groups"].append(
            self.accelerator.gather(torch.tensor(float(len(dull)) if len(useful) else 0.0, device=here.device))
            .sum()
            .item()
            / len(rewards)
        )
        if len(useful) and len(dull):
            keys = batch["row_ids"].view(-1, size)[dull.to(batch["row_ids"].device), 0]
            uniform = keyed_uniform(self.args.seed, "substitute", keys).to(useful.device)
            source = torch.arange(len(here), device=useful.device)
            source[dull] = useful[(uniform * len(useful)).long()]
            index = (source[:, None] * size + torch.arange(size, device=source.device)).flatten()
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.dim() and len(value) == rows:
                    batch[name] = value[index.to(value.device)]
        batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
