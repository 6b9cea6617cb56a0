"""What becomes of a rollout and its rewards before it is learnt from: TRL's batch with what the engine recorded.

Owns the entries of the batch, its masks and denominators, and where an intervention and an algorithm's own advantages
come in. Scores are `scores.py`'s. TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.tracking.training import TrainingReplays
from rl4dlm.training.contract import check_contract
from rl4dlm.training.interventions.intervention import Intervention
from rl4dlm.training.interventions.trainer import InterveningTrainer, groups
from rl4dlm.training.loss_parts import resized
from rl4dlm.training.metrics import identical_groups
from rl4dlm.training.rollout_columns import recorded_columns, with_rollout
from rl4dlm.training.scores import ScoringTrainer
from rl4dlm.training.setup import swapped

check_contract(
    GRPOTrainer,
    parameters={
        "_generate_and_score_completions": ["inputs"],
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_prepare_inputs": ["generation_batch"],
    },
    attributes=[
        "_logs", "_metrics", "_tokenizer", "multi_objective_aggregation", "num_generations", "num_generations_eval",
        "num_iterations", "reward_func_names", "reward_weights",
    ],
    keys={
        "_generate_and_score_completions": [
            "completion_ids", "completion_mask", "advantages", "num_items_in_batch", "prompt_ids", "prompt_mask",
            "old_per_token_logps", "ref_per_token_logps",
        ],
    },
    module=grpo,
    names=["shuffle_sequence_dict"],
)  # fmt: skip


class BatchTrainer(InterveningTrainer, ScoringTrainer):
    """Turns a rollout and its rewards into the batch that a loss sees."""

    intervention: Intervention | None
    _current_rollout: Rollout | None
    _rewards_per_func: Tensor | None
    _scored_rewards: Tensor | None = None
    _replaced_rows: list[int]
    _asked: tuple[Any, Any]
    _replays: TrainingReplays

    uses_old_policy: bool = True
    """Whether the loss compares with the policy that made the completions; if not, that is never scored."""

    @abstractmethod
    def _watch_draws(self, identical: float, groups: int) -> None:
        """Is told the share of a batch's groups, of all processes, whose completions are all the same."""

    @abstractmethod
    def prepare_batch(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Changes a finished batch in place."""

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """Adds to a batch what is made of its rollout, before advantages and scores; in training and evaluation.

        Args:
            batch: of this process: tensors whose first dimension is its completions, and `num_items_in_batch`.
            rollout: this process's, as it is learnt from.
            rewards_per_func: `[N * G, F]` of all processes, by reward function; NaN where one could not tell.
        """

    @abstractmethod
    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Advantages, or weights, of completions; None: TRL's own."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        assert self._current_rollout is not None
        self._asked = inputs, prompts
        seen = with_rollout(inputs, self._current_rollout)
        rewards: Tensor = super()._calculate_rewards(seen, prompts, completions, completion_ids_list)
        if self.intervention is not None and self.model.training:
            rewards = self._intervene(inputs, prompts, completions, rewards)
        self._rewards_per_func = rewards
        return rewards  # [N * G, F], of all processes

    def rewards_of_canvases(self, rollout: Rollout, canvases: Tensor) -> Tensor:
        """Weighted rewards `[B, K]` of other canvases of this process's rows, long `[B, K, L]`; NaN if none could tell.

        Every reward function sees their texts up to the first end, in one call, with the columns of the row. What it
        logs is not kept.
        """
        inputs, prompts = self._asked
        columns, texts, ids = [], [], []
        for canvas in canvases.to(rollout.canvas.device).unbind(1):
            other = replace(rollout, canvas=canvas, valid=valid_mask(canvas, self.spec.eos_token_ids))
            columns += with_rollout(inputs, rollout)
            texts += self._texts(prompts, other)
            ids += other.completion_ids
        with ExitStack() as stack:
            stack.enter_context(swapped(grpo, "gather", lambda values: values))  # all of them are this process's
            for name in ("_pending_extra_logs", "_pending_metrics"):
                stack.enter_context(swapped(self, name, defaultdict(list)))
            found = super()._calculate_rewards(columns, list(prompts) * canvases.shape[1], texts, ids)
        return self._summed(found).view(canvases.shape[1], len(prompts)).T.contiguous()

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        shuffle = grpo.shuffle_sequence_dict
        with swapped(grpo, "shuffle_sequence_dict", lambda batch: self._groups_together(shuffle(batch))):
            return super()._prepare_inputs(generation_batch)

    def _groups_together(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A shuffled batch whose rows are in the same optimizer steps, but in micro-batches with their group mates.

        What completions of a prompt have in common is computed once if they are in one micro-batch. Which rows make a
        step, and so its gradient, stays the shuffle's; with `loss_type="bnpo"`, whose means are of micro-batches, these
        stay the shuffle's, too. Not with `self_normalize="group"`, which needs whole groups: of these, the shuffle
        decides the order.
        """
        length, accumulated = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        whole = self.args.self_normalize == "group"
        if not whole and (self.loss_type == "bnpo" or (length % accumulated and accumulated % length)):
            return batch  # the micro-batches of a step are others in each pass
        row_ids = batch["row_ids"]
        window = len(row_ids) // length * min(length, accumulated)  # rows that are in one step in every pass
        _, group = torch.unique(groups(row_ids, self.num_generations), return_inverse=True)
        place = torch.arange(len(row_ids), device=row_ids.device)
        if whole:
            copy = (row_ids[:, None] == row_ids).tril(-1).sum(1)  # of a group that is there twice
            _, group = torch.unique(group * len(row_ids) + copy, return_inverse=True)
            order = (
                torch.full_like(place, len(place)).scatter_reduce(0, group, place, "amin")[group].argsort(stable=True)
            )
        else:
            order = (place // window * len(row_ids) + group).argsort(stable=True)
        places = order.tolist()

        def reordered(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == len(order):
                return value[order]
            return [value[place] for place in places] if isinstance(value, list) and len(value) == len(order) else value

        return {name: reordered(value) for name, value in batch.items()}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions([dict(row) for row in inputs])
        rollout, rewards = self._current_rollout, self._rewards_per_func
        assert rollout is not None and rewards is not None
        self._current_rollout = self._rewards_per_func = None
        self._scored_rewards = rewards
        device, training = self.accelerator.device, self.model.training
        mode, num_generations = ("train", self.num_generations) if training else ("eval", self.num_generations_eval)
        # Batch-first tensors only: TRL shuffles and splits every entry along the first dimension.
        batch["canvas_ids"] = rollout.canvas.to(device)
        batch["canvas_valid"] = rollout.valid.to(device)
        batch["row_ids"] = torch.tensor(rollout.row_ids, device=device)
        batch["drawn"] = (rollout.trace.commit_step >= 0).to(device)
        trace = rollout.trace
        tempered = self.args.score_temperature != 1 and trace.log_prob is not None
        recorded = trace.log_prob if tempered else trace.raw_log_prob
        if self.args.cfg_scale and not tempered and trace.confidence is not None:
            recorded = trace.confidence.clamp(min=torch.finfo(trace.confidence.dtype).tiny).log()  # scores are guided
        if rollout.recorded:
            assert recorded is not None
            batch["drawn_log_probs"] = recorded.to(device)
            batch |= {name: values.to(device) for name, values in recorded_columns(trace).items()}
        if rollout.trace.length is not None:
            slots = torch.arange(rollout.canvas.shape[1], device=device)
            batch["canvas_seen"] = slots < rollout.trace.length.to(device)[:, None]
        intervened = self.intervention is not None and training
        if intervened:
            batch["hinted"] = rollout.hinted.to(device)
            batch["replaced"] = torch.zeros(len(rollout), dtype=torch.bool, device=device)
            batch["replaced"][self._replaced_rows] = True
            self._with_completions(batch, rollout)
        if self.estimator.scope == "canvas":
            kept = batch["completion_mask"].any(-1, keepdim=True)  # false: masked out because it was truncated
            batch["completion_ids"] = batch["canvas_ids"]
            batch["completion_mask"] = kept.long().expand_as(batch["canvas_ids"]).contiguous()
        if intervened and not self.scores_hints:
            shown = resized(batch["hinted"], batch["completion_mask"].shape[1])
            batch["completion_mask"] = batch["completion_mask"] * ~shown
        if intervened or self.estimator.scope == "canvas":
            batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        canvas, valid = (self.accelerator.gather(batch[name]) for name in ("canvas_ids", "canvas_valid"))
        same = identical_groups(canvas, valid, num_generations)
        self._metrics[mode]["diffusion/identical_completion_groups"].append(same)
        if training:
            self._watch_draws(same, len(canvas) // num_generations)
        if self.args.log_replays and training and self.accelerator.is_main_process:
            summed = self._summed(rewards)[: len(rollout)].tolist()
            self._replays.hold(rollout, self._tokenizer, self.state.global_step + 1, summed)
        if not self.uses_old_policy:
            batch.pop("old_per_token_logps", None)
        self.extend_batch(batch, rollout, rewards)
        if training:
            self._add_credit(batch, rollout)
        del self._asked
        first = self._scores_come_first()
        if not first:
            self._replace_advantages(batch, rewards, num_generations)
        self._score_fixed_policies(batch, iterations=self.num_iterations if training else 1)
        if first:
            self._replace_advantages(batch, rewards, num_generations)
        if training:
            self.prepare_batch(batch, self._summed(rewards).view(-1, num_generations))
        self._scored_rewards = None
        return batch

    def _replace_advantages(self, batch: dict[str, Any], rewards_per_func: Tensor, num_generations: int) -> None:
        summed = self._summed(rewards_per_func).view(-1, num_generations)
        advantages = self.advantages(summed, batch)
        local = len(batch["advantages"])
        own = slice(self.accelerator.process_index * local, (self.accelerator.process_index + 1) * local)
        if advantages is not None:
            self._use_advantages(advantages.nan_to_num(nan=0.0).flatten(), own, batch)
        elif self.multi_objective_aggregation == "sum_then_normalize":
            # The mean of equal rewards may differ from them in the last digit, which a deviation near zero makes large.
            equal = (summed == summed[:, :1]).all(-1, keepdim=True).expand_as(summed).flatten()[own]
            batch["advantages"] = batch["advantages"].masked_fill(equal, 0.0)
        if self.args.negative_advantage_weight != 1:
            signed = batch["advantages"]
            batch["advantages"] = torch.where(signed < 0, self.args.negative_advantage_weight * signed, signed)
        self._note_rows_weighed(batch)

    def _use_advantages(self, everyone: Tensor, own: slice, batch: dict[str, Any]) -> None:
        batch["advantages"] = everyone[own].to(batch["advantages"])
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(everyone))):
            logged.pop()
        logged.extend(everyone.tolist())

    def _summed(self, rewards_per_func: Tensor) -> Tensor:
        """Weighted rewards `[N * G]`; NaN where no function could tell."""
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(-1)
        return rewards.masked_fill(rewards_per_func.isnan().all(-1), torch.nan)

    def rewards_of(self, name: str) -> Tensor:
        """`[N, G]`, what the reward function of this name gave the completions of the batch that is being made.

        For `advantages` and `prepare_batch`: of all processes, before `reward_weights`; NaN where it could not tell.
        """
        assert self._scored_rewards is not None
        generations = self.num_generations if self.model.training else self.num_generations_eval
        return self._scored_rewards[:, self.reward_func_names.index(name)].view(-1, generations)
