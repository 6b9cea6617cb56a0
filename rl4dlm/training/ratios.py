"""Policy ratios in a loss: their clip, their weights, and TRL's loss with another clip than PPO's.

Owns how the settings of `clip_settings.py` act, and over which completions weights are normalised. Formulas are in
`clipping.py`. TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.training.clipping import (
    Clip,
    bounded_log_ratio,
    clipped_units,
    effective_share,
    group_means,
    importance_weights,
    self_normalised,
    surrogate,
)
from rl4dlm.training.contract import check_contract
from rl4dlm.training.interventions.trainer import groups
from rl4dlm.training.loss_parts import LossParts, PolicyScores
from rl4dlm.training.losses import weighted_likelihood

_TRLS = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")

check_contract(
    GRPOTrainer,
    parameters={"_compute_loss": ["model", "inputs"]},
    attributes=["epsilon_high", "epsilon_low", "importance_sampling_level", "num_generations", "num_generations_eval"],
    keys={
        "_compute_loss": [
            "advantages", "old_per_token_logps", "sampling_per_token_logps", *(f"clip_ratio/{name}" for name in _TRLS),
        ],
    },
)  # fmt: skip


class RatioTrainer(LossParts):
    """Clips of policy ratios, for the `loss` of an algorithm and for TRL's."""

    _current_scores: PolicyScores | None
    _collected: list[tuple[Tensor, Tensor, Tensor]] | None = None
    _ready_weights: list[Tensor] | None = None
    """Of each micro-batch of the buffer, where one of them alone does not say what weights are divided by."""

    @property
    def clip(self) -> Clip:
        """The clip of the settings."""
        return Clip(self.args.clip, self.epsilon_low, self.epsilon_high, self.args.delta)

    def groups_of(self, batch: dict[str, Any]) -> Tensor:
        """Which rows weights are normalised over together, long `[B]`: by group, or all of them."""
        if self.args.self_normalize == "batch":
            return torch.zeros_like(batch["row_ids"])
        return groups(batch["row_ids"], self.num_generations if self.model.training else self.num_generations_eval)

    def with_advantage(self, batch: dict[str, Any]) -> Tensor:
        """Those that have one, and with self-normalisation those that share a mean with them."""
        return self.with_mates(super().with_advantage(batch), batch)

    def with_mates(self, found: Tensor, batch: dict[str, Any]) -> Tensor:
        """Rows, bool `[B]`, and with self-normalisation all whose weights are in a mean with theirs.

        Where a batch was built these are noted in it, since a micro-batch does not have all of a group.
        """
        if self.args.self_normalize == "none":
            return found
        if batch.get("rows_weighed") is not None:
            noted: Tensor = batch["rows_weighed"]
            return noted
        share = group_means(found, self.groups_of(batch), None, self.accelerator.gather)
        return batch["completion_mask"].any(-1) & (share > 0)

    def is_on_policy(self, batch: dict[str, Any]) -> bool:
        """Whether there is no old policy to compare with, so that all ratios are 1."""
        return batch.get("old_per_token_logps") is None

    @property
    def weights_are_split(self) -> bool:
        """Whether completions that share a mean are in several micro-batches."""
        args = self.args
        if args.self_normalize == "none" or args.steps_per_generation == 1:
            return False
        return args.self_normalize == "batch" or bool(args.per_device_train_batch_size % self.num_generations)

    def unit_weights(self, log_ratio: Tensor, counts: Tensor, batch: dict[str, Any]) -> Tensor:
        """Ratios as constant weights: clipped on both sides, and normalised as `self_normalize` says; float64.

        Args:
            log_ratio: of each unit, `[B, ...]`. counts: broadcast against it, the units that the loss has: bool, or
                shares that add up to 1 over the entries of a unit that has several.
            batch: with `row_ids` `[B]`.
        """
        weights = importance_weights(log_ratio, self.clip)
        if self.args.self_normalize == "none":
            return weights
        found = weights, counts.expand_as(weights), self.groups_of(batch)
        if self._collected is not None:
            self._collected.append(found)
            return torch.ones_like(weights)
        if self._ready_weights is not None:
            assert self.args.steps_per_generation is not None
            return self._ready_weights[self._step % self.args.steps_per_generation]
        return self.normalised(*found)

    def normalised(self, weights: Tensor, counts: Tensor, together: Tensor) -> Tensor:
        """Weights over their means, of groups that other processes may have parts of; logs how even they are."""
        gather, rows = self.accelerator.gather, counts.reshape(len(counts), -1).any(1)
        share = effective_share(weights, together, counts, gather)
        self.log_mean("diffusion/effective_sample_share", share, rows.double())
        return self_normalised(weights, together, "group", counts, gather)

    def surrogate(
        self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, counts: Tensor, batch: dict[str, Any]
    ) -> Tensor:
        """`clipping.surrogate` under the settings, with self-normalised weights where these are asked for.

        Args:
            log_ratio, log_probs, advantages: as there; the first dimension is the batch's rows.
            counts, batch: as for `unit_weights`.
        """
        if self.clip.kind != "unconditional":
            return surrogate(log_ratio, log_probs, advantages, self.clip)
        weights = self.unit_weights(log_ratio, counts, batch).to(log_probs)
        return weighted_likelihood(log_probs, weights * advantages)

    def trl_loss(self, batch: dict[str, Any]) -> Tensor:
        """TRL's loss, with all of its settings, under `clip`.

        TRL's clips are part of its loss, but it takes any old policy and an advantage for each token. It is given an
        old policy to which the ratio is the bounded one (`"log"`), or the current one itself, and advantages times
        weights, whose loss has the gradient of `-w A L` and the value of `-w A`.
        """
        if self.args.clip == "ppo":
            return super().trl_loss(batch)
        assert self._current_scores is not None
        current, mask = self._current_scores.log_probs, batch["completion_mask"]
        advantages, counts = batch["advantages"][:, None], mask.bool()
        log_ratio = self.log_ratio_to("old", current, batch)
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            counts = counts.any(-1, keepdim=True)
        clip, given = self.clip, dict(batch)
        given["sampling_per_token_logps"] = current.detach() - self.log_ratio_to("old", current, batch).detach()
        if clip.kind == "unconditional":
            weights = self.unit_weights(log_ratio, counts, batch)
            if self._collected is not None:
                return log_ratio.sum()  # nobody asks for it, and TRL's losses note what they see
            seen, given["advantages"] = log_ratio - log_ratio.detach(), weights.to(current) * advantages
        elif clip.kind == "none":
            seen, given["advantages"] = log_ratio - log_ratio.detach(), log_ratio.detach().exp() * advantages
        else:
            seen = bounded_log_ratio(log_ratio, advantages, clip)
        given["old_per_token_logps"] = current - seen
        loss = super().trl_loss(given)
        logged = self._metrics["train" if self.model.training else "eval"]
        for name in _TRLS:
            logged[f"clip_ratio/{name}"].pop()  # of what TRL was given
        self.log_clipped(log_ratio, advantages, counts)
        return loss

    @torch.no_grad()
    def log_clipped(self, log_ratio: Tensor, advantages: Tensor, counts: Tensor) -> None:
        """TRL's metrics `clip_ratio/*`, of all processes: shares of the units `[B, ...]` that count."""
        low, high = clipped_units(log_ratio, advantages, self.clip)
        counted = counts.expand_as(low)
        units = torch.stack([low & counted, high & counted, counted], dim=1).reshape(len(low), 3, -1).sum(-1)
        rows: Tensor = self.accelerator.gather(units)  # [N, 3]
        rows = rows[rows[:, 2] > 0] if rows[:, 2].any() else rows.new_tensor([[0, 0, 1]])
        below, above, number = rows.double().unbind(1)
        logged = self._metrics["train" if self.model.training else "eval"]
        logged["clip_ratio/low_mean"].append((below.sum() / number.sum()).item())
        logged["clip_ratio/high_mean"].append((above.sum() / number.sum()).item())
        logged["clip_ratio/region_mean"].append(((below + above).sum() / number.sum()).item())
        logged["clip_ratio/low_min"].append((below / number).min().item())
        logged["clip_ratio/high_max"].append((above / number).max().item())
