"""IGPO (Zhao et al., arXiv 2509.10396): GRPO whose hopeless groups are shown pieces of a worked solution.

Where all completions of a prompt are wrong, some are replaced by right ones that were written around hints
(`rl4dlm.training.interventions.inpainting`). Scores s are those of the whole completion hidden behind a clean
prompt. With
A = r - mean of the group's r after replacement, and one ratio for a sequence (section 3.2),

    rho = exp(mean over tokens of s - s_old),
    loss = mean over sequences, then tokens, of -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta KL,

where of the tokens that were given only the share tau counts of which the old policy was least certain, by the entropy
of its prediction (section 3.3).

Where the paper and its released code differ, or both are wrong, this is decided:
- The filter acts in the ratio as well as in the average. In the code the ratio averages all tokens, so that dropped
  hints still get a gradient; that is not offered. Tokens after the first end of sequence count in neither; in the code
  they count in both.
- `loss_type="grpo"` is the paper's average, `"bnpo"` the code's, over the tokens of a micro-batch.
- The share of kept hints is rounded down, to at least one per sequence.
- The code's other views, at UniGRPO's levels, are `UniGRPOTrainer(..., intervention=Inpainting())`.
- The code trains partly with dropout, and its index of the pass counts micro-steps; neither here.
- What is decided about hints is in `inpainting.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.training.interventions.inpainting import Inpainting, InpaintingSettings
from rl4dlm.training.loss_parts import resized
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer, PolicyScores


@dataclass
class IGPOConfig(InpaintingSettings, DiffusionPolicyConfig):
    """Settings of IGPO: those of `InpaintingSettings`, and these. The defaults are the paper's, but for
    sizes, optimizer and `loss_type`, which configuration files set.

    Args:
        hint_entropy_share: tau, the share of a sequence's given tokens that count in the loss, those of the highest
            entropy. 1: all. 0: none.
        num_iterations: mu, passes over a batch of completions.
        epsilon: clip range. beta: weight of the KL term.
        importance_sampling_level: `"sequence"`: one ratio for all tokens of a completion; `"token"`: one for each.
        loss_type: how tokens are averaged, see the module.
        scale_rewards: `"none"`: advantages are not divided by the group's standard deviation.
        temperature: of the rollout; scores are computed at `score_temperature` 1.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    hint_entropy_share: float = field(
        default=0.2, metadata={"help": "Share of the hint tokens, those of highest entropy, that count in the loss."}
    )
    num_iterations: int = field(default=4, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    importance_sampling_level: str = field(
        default="sequence", metadata={"help": "One policy ratio for each sequence or each token."}
    )
    loss_type: str = field(default="grpo", metadata={"help": "How tokens are averaged, as in TRL."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    num_generations: int | None = field(default=8, metadata={"help": "Completions of each prompt (G)."})
    temperature: float = field(default=1.2, metadata={"help": "Temperature of the rollout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_inpainting()
        if not 0 <= self.hint_entropy_share <= 1:
            raise ValueError(f"hint_entropy_share={self.hint_entropy_share} is not allowed; it must be in [0, 1]")
        if self.num_generations is not None and int(self.max_replaced_share * self.num_generations) < 1:
            raise ValueError(
                f"max_replaced_share={self.max_replaced_share} of num_generations={self.num_generations} is less than "
                "one completion, so nothing would ever be replaced; make one of them larger"
            )


class IGPOTrainer(DiffusionPolicyTrainer):
    """IGPO in TRL's GRPO loop; `IGPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = IGPOConfig
    args: IGPOConfig
    advantages_read_scores = False
    scores_hints = True
    needs_masks = "given tokens would be replaced by random ones while decoding, so that nothing could be inpainted"
    _tag_names = ["trl", "rl4dlm", "igpo"]  # noqa: RUF012  (TRL's own form)
    _name = "IGPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Inpainting-Guided Policy Optimization for Diffusion Large Language Models",
        "id": "2509.10396",
    }

    @property
    def needs_old_entropies(self) -> bool:  # type: ignore[override]
        """Whether the filter has something to choose by."""
        return 0 < self.args.hint_entropy_share < 1

    def build_estimator(self) -> MeanField:
        """The mean-field estimator without prompt masking."""
        return MeanField(p_mask_prompt=0.0, scope=self.args.scope)

    def build_intervention(self) -> Inpainting:
        """Inpainting with this run's settings."""
        return Inpainting(**{f.name: getattr(self.args, f.name) for f in fields(InpaintingSettings)})

    def prepare_batch(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Counts the tokens that the filter leaves; it leaves as many in every pass."""
        hints = self._hints(batch).sum(-1)
        dropped = hints - kept_hints(hints, self.args.hint_entropy_share)
        total = batch["completion_mask"].sum() - dropped.sum()
        batch["num_items_in_batch"] = self.accelerator.gather(total).sum()

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """As in TRL's loss: which hints count is a matter of the old policy."""
        return super().rows_that_count(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """TRL's loss over all tokens but the given ones of low entropy."""
        if "hinted" not in batch:  # in evaluation nothing is given
            return super().loss(scores, batch)
        hints = self._hints(batch)
        share = self.args.hint_entropy_share
        entropies = batch["old_entropies"] if self.needs_old_entropies else torch.zeros_like(scores.log_probs)
        kept = most_entropic(entropies, hints, share)
        mask = batch["completion_mask"].bool() & (~hints | kept)
        return super().loss(scores, {**batch, "completion_mask": mask.to(batch["completion_mask"].dtype)})

    def _hints(self, batch: dict[str, Any]) -> Tensor:
        """bool `[B, C]`, the tokens of the loss that were given."""
        mask = batch["completion_mask"].bool()
        return resized(batch["hinted"], mask.shape[1]) & mask


def kept_hints(hints: Tensor, share: float) -> Tensor:
    """How many of so many given tokens (long `[B]`) count: a share, rounded down, and at least one."""
    if share == 0:
        return torch.zeros_like(hints)
    return (hints * share + 1e-6).floor().long().clamp(min=1).minimum(hints)


def most_entropic(entropies: Tensor, hints: Tensor, share: float) -> Tensor:
    """bool `[B, C]`: of the given tokens of each row (`hints`) those of the highest entropies; ties go to the left."""
    order = entropies.masked_fill(~hints, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1, stable=True)
    return hints & (rank < kept_hints(hints.sum(-1), share)[:, None])
