"""The part of a trainer that plug-ins of credit need: their entries of the batch, their views, and their loss.

Owns when a plug-in is asked and how what it says reaches a loss. What it says is in `credit.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.predictions import PredictedSteps
from rl4dlm.likelihood.scoring import ViewScores
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.training.advantages import leave_one_out
from rl4dlm.training.config import DiffusionPolicyConfig
from rl4dlm.training.credit.credit import Credit
from rl4dlm.training.credit.dispo import filling_losses
from rl4dlm.training.ratios import RatioTrainer


class CreditTrainer(RatioTrainer):
    """A trainer that may have a plug-in of credit."""

    args: DiffusionPolicyConfig
    spec: DiffusionSpec
    decoding: DecodingConfig
    estimator: Estimator
    credit: Credit | None = None

    @abstractmethod
    def rewards_of_canvases(self, rollout: Rollout, canvases: Tensor) -> Tensor:
        """Weighted rewards `[B, K]` of other canvases of this process's rows, long `[B, K, L]`."""

    # --- when a trainer is built --------------------------------------------------------------------------------------

    def _decoding_for(self, credit: Credit | None) -> DecodingConfig:
        """How rollouts are decoded, so that a plug-in can learn from them. ValueError for those that it cannot."""
        decoding = self.args.decoding(self.spec)
        self.credit = credit
        if credit is None:
            return decoding
        name = type(credit).__name__
        if self.spec.noise != "mask":
            raise ValueError(f"credit={name} is not supported for noise={self.spec.noise!r}: it learns from open slots")
        more = credit.recorded(decoding)
        try:
            return self.args.decoding(self.spec, **more)
        except ValueError as error:
            raise ValueError(f"credit={name} needs a record that these rollouts cannot have: {error}") from None

    def _check_credit(self) -> None:
        """Raises ValueError where the algorithm, the model or a setting does not go with the plug-in."""
        if self.credit is None:
            return
        name = type(self.credit).__name__
        if self.credit.weighs_tokens and isinstance(self.estimator, PredictedSteps):
            raise ValueError(
                f"credit={name} is not allowed with {type(self).__name__}, which scores predictions of open slots, and "
                "not the tokens that the weights are of"
            )
        if not self.credit.weight:
            return
        if self.spec.attention in BLOCK_KINDS:
            raise ValueError(
                f"credit={name} is not supported for attention={self.spec.attention!r}: blocks behind the active one "
                "would be scored with finished blocks before them, and not as they were filled"
            )
        if self.args.mask_truncated_completions:
            raise ValueError(
                f"mask_truncated_completions=True is not supported with credit={name}: fillings of one state would be "
                "left out by what they are; set it to False"
            )

    # --- the batch ----------------------------------------------------------------------------------------------------

    def _add_credit(self, batch: dict[str, Any], rollout: Rollout) -> None:
        """Adds weights of tokens, and fillings with their advantages, to a training batch of this process."""
        if self.credit is None:
            return
        device = batch["canvas_ids"].device
        weights = self.credit.token_weights(rollout)
        if weights is not None:
            batch["token_weights"] = weights.to(device)
        found = self.credit.fillings(rollout)
        if found is None:
            return
        rows, states, count, _ = found.tokens.shape
        flat = found.tokens.flatten(1, 2)
        rewards = self.rewards_of_canvases(rollout, flat).to(device).view(rows, states, count)
        opened = (found.shown == self.spec.mask_token_id).any(-1).to(device)[..., None].expand_as(rewards)
        self.log_mean("diffusion/filling_reward", rewards.nan_to_num(nan=0.0), opened & ~rewards.isnan())
        advantages = torch.where(opened, leave_one_out(rewards.double()).nan_to_num(nan=0.0), 0.0)
        equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)  # their mean may differ from them in the last digit
        advantages = torch.where(equal, 0.0, advantages)
        self.log_mean("diffusion/filling_advantage_share", advantages != 0, opened)
        weight = self.args.negative_advantage_weight
        batch["filling_states"], batch["filling_tokens"] = found.shown.to(device), flat.to(device)
        batch["filling_advantages"] = torch.where(advantages < 0, weight * advantages, advantages)

    def _with_filled(self, counted: Tensor, batch: dict[str, Any]) -> Tensor:
        """Rows that count, bool `[B]`, and those of which some filling does."""
        advantages = batch.get("filling_advantages")
        return counted if advantages is None else counted | (advantages != 0).flatten(1).any(-1)

    # --- views and loss -----------------------------------------------------------------------------------------------

    def _filling_views(self, rows: Rows, batch: dict[str, Any]) -> Views:
        """`[B, K Z]`, the state before each filling, and its tokens up to the first end."""
        tokens, advantages = batch["filling_tokens"], batch["filling_advantages"]
        shown = batch["filling_states"].repeat_interleave(advantages.shape[-1], dim=1)
        prompt = rows.prompt_ids[:, None].expand(-1, shown.shape[1], -1)
        within = valid_mask(tokens.flatten(0, 1), self.spec.eos_token_ids).view_as(tokens)
        counted = (shown == self.spec.mask_token_id) & within & (advantages != 0).flatten(1)[..., None]
        other = shown != rows.canvas_ids[:, None]
        return Views(
            hidden=torch.cat([torch.zeros_like(prompt, dtype=torch.bool), other], dim=-1),
            weight=counted.double(),
            ids=torch.cat([prompt, shown], dim=-1),
            targets=tokens,
        )

    def _with_fillings(self, views: Views, rows: Rows, batch: dict[str, Any]) -> Views:
        """Views of an estimator, and behind them those of fillings: one forward for both."""
        if batch.get("filling_tokens") is None:
            return views
        more = self._filling_views(rows, batch)
        ids = (
            torch.full_like(views.hidden, self.spec.mask_token_id, dtype=torch.long) if views.ids is None else views.ids
        )
        targets = rows.canvas_ids[:, None].expand_as(views.weight) if views.targets is None else views.targets
        assert more.ids is not None and more.targets is not None
        return Views(
            torch.cat([views.hidden, more.hidden], dim=1),
            torch.cat([views.weight, more.weight.to(views.weight)], dim=1),
            torch.cat([ids, more.ids], dim=1),
            torch.cat([targets, more.targets], dim=1),
        )

    def _credited(
        self, found: ViewScores, views: Views, count: int, batch: dict[str, Any], kept: Tensor | None
    ) -> tuple[ViewScores, Tensor | float]:
        """Scores of the first `count` views, with the gradient that weights leave of each, and the loss of fillings.

        Args:
            found: of all views and the rows that are `kept`. views: of all rows.
        """
        main, of_fillings = found, found.log_probs[:, count:]
        if of_fillings.shape[1]:
            values = None if found.values is None else found.values[:, :count]
            main = ViewScores(found.log_probs[:, :count], found.entropies[:, :count], values=values)
        weights = batch.get("token_weights")
        if weights is not None:
            own = (weights if kept is None else weights[kept])[:, None].to(main.log_probs)
            still = main.log_probs.detach()
            # The values are exactly what they were: what is weighed is the gradient.
            main = main._replace(log_probs=still + own * (main.log_probs - still))
        if not of_fillings.shape[1]:
            return main, 0.0
        return main, self._filling_loss(of_fillings, views.scored[:, count:], batch, kept)

    def _filling_loss(self, log_probs: Tensor, scored: Tensor, batch: dict[str, Any], kept: Tensor | None) -> Tensor:
        assert self.credit is not None
        advantages, old = batch["filling_advantages"], batch.get("filling_log_probs")
        shape = *advantages.shape, -1
        opened = (batch["filling_states"] == self.spec.mask_token_id).sum(-1)[..., None].expand_as(advantages)
        parts = [advantages, scored.view(shape), opened, *([] if old is None else [old.view(shape)])]
        own = [part if kept is None else part[kept] for part in parts]
        current = log_probs.view(*own[0].shape, -1)
        other = current.detach() if old is None else own[3].to(current)
        each = filling_losses(
            current, current - other, own[0].to(current), own[1], own[2].to(current), self.credit.epsilon
        )
        # A row without a state has as many as the others: how many it makes is known only at its end.
        rows = each.flatten(1).mean(-1)
        if kept is not None:
            rows = rows.new_zeros(len(advantages)).index_copy(0, kept, rows)
        return self.credit.weight * self.mean_over_rows(rows)
