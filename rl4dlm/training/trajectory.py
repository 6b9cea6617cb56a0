"""The core of algorithms that learn from the recorded denoising: scored steps, their advantages, ratios and averages.

A method chooses steps of the record, scores the tokens that they wrote in the state before them, weighs them, gives
each an advantage, forms a ratio of some unit, clips it and averages; which of each is a setting
(`trajectory_settings`), and a paper's choice an algorithm's file. With ell the log-probability of a unit (a token, or
the tokens of a step or of a sequence), rho = exp(ell - ell_old), and C the clipped loss of `rl4dlm.training.clipping`,
the loss of a token i is

    C(rho_u(i), A_u(i)) / n_u + beta KL_i,        n_u the number of the unit's tokens (1 for a ratio of their mean)

and these, times the weights of their steps, are averaged as `aggregation` says. Since n_u is in there, the gradient is
that of sum A log p over tokens for every unit, as long as ratios are 1.

A step's advantage may use what was known before the step, never what came of it: a baseline that has seen the action
biases the gradient (enumerated in the tests).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.step_selectors import BlockSlices, EntropyThreshold, step_entropy
from rl4dlm.likelihood.steps import RecordedSteps, Steps, Units
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.clipping import clipped_units
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.losses import kl_estimate
from rl4dlm.training.scores import rows_of
from rl4dlm.training.trainer import DiffusionPolicyTrainer
from rl4dlm.training.trajectory_settings import TrajectoryConfig
from rl4dlm.training.value import ValuedTrainer

THRESHOLD = "StepEntropyThreshold"
"""Where the state of training, and so a checkpoint, has the entropy that steps of the next batch must reach."""


class TrajectoryTrainer(ValuedTrainer):
    """RL on recorded steps; an algorithm has settings of its own, and may define `step_rewards`, `step_advantages`."""

    config_class: type[TrajectoryConfig] = TrajectoryConfig
    args: TrajectoryConfig
    estimator: RecordedSteps
    advantages_read_scores = False
    needs_masks = (
        "it scores the steps that wrote tokens for good, and where all tokens are refined until the last step there "
        "are none; the likelihood of such a trajectory is another one"
    )
    per_iteration = (*DiffusionPolicyTrainer.per_iteration, "step_advantages")

    @property
    def uses_old_policy(self) -> bool:  # type: ignore[override]
        """Unless ratios are 1."""
        return self.args.old_policy != "none"

    # --- what an algorithm may define ---------------------------------------------------------------------------------

    def step_rewards(self, rollout: Rollout, steps: Steps) -> Tensor | None:
        """Rewards `[B, K]` of the state before each chosen step of this process's rows; None: there are none.

        What is behind a row's last chosen step is not read. `rewards_of_canvases` asks the reward functions.

        Args:
            rollout: of this process. steps: by their numbers in its record, `Trace.commit_step`.
        """
        return None

    def step_advantages(self, rewards: Tensor, step_rewards: Tensor | None, batch: dict[str, Any]) -> Tensor | None:
        """Advantages of the chosen steps; None: those of completions.

        Args:
            rewards: `[N, G]` of all processes, NaN where a completion could not be scored.
            step_rewards: `[N, G, K]` of all processes, NaN behind a row's last step; None: there are none.
            batch: of this process, without advantages and scores yet.

        Returns:
            `[N, G, K]`.
        """
        return None

    # --- the record ---------------------------------------------------------------------------------------------------

    def build_estimator(self) -> RecordedSteps:
        """Views of the chosen steps. ValueError for rollouts whose record does not say what was drawn where."""
        name, schedule = type(self).__name__, self.decoding.build_schedule()
        if self.spec.noise == "mask":
            if not getattr(schedule, "monotone", True):
                raise ValueError(
                    f"schedule={self.decoding.schedule!r} is not allowed: it takes tokens back, replaces or moves "
                    f"them or changes the length of the canvas, and {name} scores steps that write tokens for good"
                )
            if getattr(schedule, "verify", None) is not None:
                raise ValueError(
                    f"schedule={self.decoding.schedule!r} is not allowed: it draws tokens from left to right within a "
                    f"step, and {name} scores them as its state says"
                )
            if getattr(schedule, "inputs", None) is not None:
                raise ValueError(
                    f"schedule={self.decoding.schedule!r} is not allowed: it feeds something else than tokens, and "
                    f"{name} scores states of tokens"
                )
            cache = self.decoding.build_cache(self.spec)
            if self.spec.attention not in cache.exact_for and self.args.old_policy != "recorded":
                raise ValueError(
                    f"cache={self.decoding.cache!r} is not allowed with old_policy={self.args.old_policy!r}: it is not "
                    f"exact for attention={self.spec.attention!r}, so that tokens were not drawn with the "
                    "probabilities that they are scored with; set cache to auto, or old_policy to recorded"
                )
        selector = self.args.selector(self.spec)
        hooks = ("step_rewards", "step_advantages")
        if isinstance(selector, BlockSlices) and any(
            getattr(type(self), hook) is not getattr(TrajectoryTrainer, hook) for hook in hooks
        ):
            raise ValueError(
                f"steps={self.args.steps!r} is not supported by {name} for models with attention="
                f"{self.spec.attention!r}: its steps have advantages of their own, and the views of such models hold "
                "steps of several blocks"
            )
        if self.needs_values and type(self).step_advantages is not TrajectoryTrainer.step_advantages:
            raise ValueError(f"value_model={self.args.value_model!r} is not allowed: {name} has advantages of its own")
        earned = self.args.value_model == "blocks" or self.args.value_rewards != "end"
        if earned and type(self).step_rewards is not TrajectoryTrainer.step_rewards:
            raise ValueError(
                f"value_model={self.args.value_model!r} with value_rewards={self.args.value_rewards!r} is not allowed: "
                f"{name} has rewards of steps; allowed: steps, with end"
            )
        blocks = self.spec.attention in BLOCK_KINDS and not isinstance(selector, BlockSlices)
        if blocks and self.args.value_model == "blocks":
            raise ValueError(
                f"value_model='blocks' is not allowed with steps={self.args.steps!r} for a model with attention="
                f"{self.spec.attention!r}; allowed: all, block_slices"
            )
        return RecordedSteps(selector, self.args.scope)

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """Adds the threshold and the advantages of steps, and counts the tokens that are scored."""
        if self.args.old_policy == "recorded":
            batch.pop("old_per_token_logps", None)
        selector = self.estimator.selector
        if isinstance(selector, EntropyThreshold):
            self._add_threshold(batch)
        rows = rows_of(batch)
        if selector.partial:  # the mean over tokens is over those that are scored
            scored = self.estimator.draw(rows, seed=self.args.seed, iteration=0).scored.any(1)
            counted = resized(scored, batch["completion_mask"].shape[1]) * batch["completion_mask"]
            batch["num_items_in_batch"] = self.accelerator.gather(counted.sum()).sum()
        rewards = self._summed(rewards_per_func).view(-1, self._group_size)
        first = self.accelerator.process_index * len(rows)
        if self.needs_values:
            batch["value_rewards"] = rewards.flatten()[first : first + len(rows)]
        iterations = self.num_iterations if selector.fresh and self.model.training else 1
        found = []
        for n in range(0 if isinstance(selector, BlockSlices) else iterations):
            steps = self.estimator.steps(rows, seed=self.args.seed, iteration=n)
            given = self.step_rewards(rollout, steps)
            if given is not None and self.needs_values:
                batch["step_rewards"] = given.masked_fill(steps.last < steps.first, torch.nan)
            elif given is not None:
                given = given.to(steps.weight).masked_fill(steps.last < steps.first, torch.nan)
                given = self._of_all_steps(given)
            advantages = self.step_advantages(rewards, given, batch)
            if advantages is not None:
                found.append(advantages)
        if not found:
            return
        width = max(each.shape[-1] for each in found)
        stacked = torch.stack([_widened(each.nan_to_num(nan=0.0), width) for each in found], dim=2)  # [N, G, n, K]
        own = stacked.flatten(0, 1)[first : first + len(rows)]
        weight = self.args.negative_advantage_weight
        batch["step_advantages"] = torch.where(own < 0, weight * own, own) if weight != 1 else own

    @property
    def _group_size(self) -> int:
        size: int = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _of_all_steps(self, values: Tensor) -> Tensor:
        """`[N, G, K]` from `[B, K]` of this process; NaN where another process has more steps."""
        width = int(self.accelerator.gather(torch.tensor([values.shape[1]], device=values.device)).max())
        gathered: Tensor = self.accelerator.gather(_widened(values, width, torch.nan).contiguous())
        return gathered.view(-1, self._group_size, width)

    def _add_threshold(self, batch: dict[str, Any]) -> None:
        """The entropy that steps must reach, from earlier batches alone; what this one says is kept for the next.

        Completions that are left out, since they were cut off, have no say: K steps are kept of those that are learnt
        from. Where such completions count (`mask_truncated_completions` is off), their steps are steps like others.
        """
        kept = self.state.stateful_callbacks.get(THRESHOLD)
        threshold = -torch.inf if kept is None else kept["attributes"]["entropy"]  # the first batch scores all steps
        entropies = batch["commit_entropy"]
        batch["entropy_threshold"] = entropies.new_full((len(entropies),), threshold)
        if not self.model.training:
            return
        trail = self.estimator.selector.trail(rows_of(batch), self.args.scope)
        there = (trail.tokens > 0) & batch["completion_mask"].any(-1, keepdim=True)
        local = step_entropy(trail).masked_fill(~there, torch.nan)
        everyone = self.accelerator.gather(local.contiguous())
        ordered = everyone[~everyone.isnan()].sort(descending=True).values
        assert self.args.num_scored_steps is not None
        if len(ordered):
            rows = int((~everyone.isnan()).any(-1).sum())
            last = min(self.args.num_scored_steps * rows, len(ordered)) - 1
            self.state.stateful_callbacks[THRESHOLD] = {"args": {}, "attributes": {"entropy": float(ordered[last])}}

    # --- scores and loss ----------------------------------------------------------------------------------------------

    def compared(self, scores: PolicyScores) -> Tensor:
        """Log-probabilities `[B, C]` of scored tokens, each in its own view and without its weight."""
        assert scores.view_log_probs is not None
        return resized(scores.view_log_probs.sum(1), scores.log_probs.shape[1])

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """Those, at the tokens that are scored."""
        assert scores.views is not None
        return self.compared(scores), resized(scores.views.scored.any(1), width)

    def log_ratio_to(self, policy: str, current: Tensor, batch: dict[str, Any]) -> Tensor:
        """As everywhere; the old policy may be what was recorded."""
        if policy == "old" and self.args.old_policy == "recorded":
            return current - resized(batch["drawn_log_probs"], current.shape[1]).to(current.dtype)
        return super().log_ratio_to(policy, current, batch)

    def _completed(self, scores: PolicyScores, batch: dict[str, Any], kept: Tensor) -> PolicyScores:
        """As everywhere: a ratio of 1 for rows that are not scored, to what was recorded as well."""
        if self.args.old_policy == "recorded":
            drawn = batch["drawn_log_probs"]
            absent = torch.ones(len(drawn), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
            current = resized(self.compared(scores).detach(), drawn.shape[1]).to(drawn.dtype)
            batch["drawn_log_probs"] = torch.where(absent[:, None], current, drawn)
        return super()._completed(scores, batch, kept)

    def is_on_policy(self, batch: dict[str, Any]) -> bool:
        """As everywhere; recorded log-probabilities are always there to compare with."""
        return self.args.old_policy != "recorded" and super().is_on_policy(batch)

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage, of the completion or of a step, unless there is a KL term or a value model."""
        if self.args.beta or self.needs_values:
            return None
        steps = batch.get("step_advantages")
        if steps is None:
            return self.with_advantage(batch)
        return self.with_mates((steps != 0).flatten(1).any(-1) & batch["completion_mask"].any(-1), batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The loss of the module's docstring."""
        assert scores.views is not None
        mask = batch["completion_mask"]
        width = mask.shape[1]
        units = self.estimator.units(rows_of(batch), scores.views)
        step = resized(units.unit + 1, width) - 1
        counted = (step >= 0) & mask.bool()
        log_probs = self.compared(scores)
        weight = resized(scores.views.weight.sum(1), width).to(log_probs) * mask
        advantages = batch["advantages"][:, None].expand_as(log_probs).to(log_probs)
        if batch.get("step_advantages") is not None:
            advantages = batch["step_advantages"].to(log_probs).gather(-1, step.clamp(min=0))
        of_values: Tensor | None = None
        if self.needs_values:
            found, of_values = self.valued(scores, torch.where(counted, step, -1), self._blocks(batch), batch)
            advantages = found.advantages.to(log_probs)

        unit = step if self.args.ratio_unit == "step" else torch.where(counted, 0, -1)
        if self.args.ratio_unit == "token":
            unit = torch.where(counted, torch.arange(width, device=step.device), -1)
        whole, mean = self.args.ratio_unit != "token", self.args.ratio_norm == "mean"
        count = _of_unit(torch.ones_like(log_probs), unit, counted)
        over = count if whole and mean else torch.ones_like(count)
        log_ratio = _of_unit(self.log_ratio_to("old", log_probs, batch), unit, counted) / over
        value = _of_unit(log_probs, unit, counted) / over
        advantages = _of_unit(advantages, unit, counted) / count
        # A unit of several tokens is one unit in the mean of weights.
        losses = self.surrogate(log_ratio, value, advantages, counted / count, batch) * over / count
        if self.args.beta:
            divergence = self._kl(log_probs, step, counted, batch)
            losses = losses + self.args.beta * divergence
            self.log_mean("kl", divergence, counted)
        low, high = clipped_units(log_ratio, advantages, self.clip)
        for name, where in (("low", low), ("high", high), ("region", low | high)):
            self.log_mean(f"clip_ratio/{name}_mean", where, counted)
        self.log_mean("diffusion/scored_token_share", counted, mask.to(log_probs))
        steps = (1 + torch.where(counted, step, -1).amax(-1)).to(log_probs)
        self.log_mean("diffusion/scored_steps", steps, mask.any(-1).to(log_probs))
        self.log_entropy(scores, mask)
        losses = torch.where(counted, losses, 0.0)
        loss = self._aggregated(losses, weight, _of_unit(torch.ones_like(losses), step, counted), units, batch)
        return loss if of_values is None else loss + of_values

    def _blocks(self, batch: dict[str, Any]) -> Tensor | None:
        """The block `[B, C]` of each token, if blocks have values: of the model's grid, or as the canvas is written."""
        if self.args.value_model != "blocks":
            return None
        width, blocks = batch["completion_mask"].shape[1], self.estimator.selector.blocks(rows_of(batch))
        if blocks is None:
            slots = torch.arange(batch["canvas_ids"].shape[1], device=batch["canvas_ids"].device)
            blocks = (slots // (self.decoding.block_length or len(slots))).expand_as(batch["canvas_ids"])
        return resized(blocks, width)

    def _kl(self, log_probs: Tensor, step: Tensor, counted: Tensor, batch: dict[str, Any]) -> Tensor:
        """Of each token, `[B, C]`; that of a step is shared out evenly."""
        if self.args.kl_unit == "token":
            return self.token_kl(log_probs, batch)
        log_ratio = _of_unit(self.log_ratio_to(self.args.kl_target, log_probs, batch), step, counted)
        return kl_estimate(log_ratio, self.args.kl_estimator) / _of_unit(torch.ones_like(log_ratio), step, counted)

    def _aggregated(self, losses: Tensor, weight: Tensor, size: Tensor, units: Units, batch: dict[str, Any]) -> Tensor:
        """One number, from losses, weights and the sizes of their steps, all `[B, C]`."""
        kind = self.args.aggregation
        if kind == "tokens":
            return self.mean_over_tokens(losses, weight, batch)
        if kind in ("steps", "step_sums"):
            summed = (losses * weight / size).sum(-1)
            return self.mean_over_rows(summed / units.steps.clamp(min=1) if kind == "steps" else summed)
        summed = (losses * weight).sum(-1)
        if kind == "rows":
            summed = summed / units.tokens.clamp(min=1)
        if kind == "canvas":
            summed = summed / self.max_completion_length
        return self.mean_over_rows(summed)


def _of_unit(values: Tensor, unit: Tensor, counted: Tensor) -> Tensor:
    """For each token the sum of values over the counted tokens of its unit, `[B, C]`; 1 where a token is not counted.

    The 1 stands where nothing is read, so that it can be divided by.
    """
    place = unit.clamp(min=0)
    total = torch.zeros_like(values).scatter_add(-1, place, torch.where(counted, values, 0.0))
    return torch.where(counted, total.gather(-1, place), 1.0)


def _widened(values: Tensor, width: int, fill: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)
