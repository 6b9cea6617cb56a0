"""The part of a trainer that interventions need: attempts are decoded, scored, and put in place of completions.

Owns when an intervention is asked and what its replacements change in TRL's batch and tables. What it decides is in
`intervention.py`. TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.checks import check_columns
from rl4dlm.training.contract import check_contract
from rl4dlm.training.interventions.intervention import Context, Group, Intervention
from rl4dlm.training.loss_parts import LossParts, resized
from rl4dlm.training.rollout_columns import with_rollout
from rl4dlm.training.setup import swapped

check_contract(
    GRPOTrainer,
    parameters={
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_log_metric": ["name", "value"],
        "_log_completion_extra": ["column", "values"],
    },
    attributes=[
        "_dist", "_metrics", "_pending_extra_logs", "_pending_metrics", "_tokenizer", "eos_token_ids",
        "mask_truncated_completions", "num_generations", "pad_to_multiple_of", "reward_func_names",
    ],
    keys={
        "_generate": [
            "completions/clipped_ratio", "completions/mean_length", "completions/min_length", "completions/max_length",
            "completions/mean_terminated_length", "completions/min_terminated_length",
            "completions/max_terminated_length",
        ],
    },
    module=grpo,
    names=["gather", "is_conversational", "parse_response"],
)  # fmt: skip

SECOND_ATTEMPT = 2**23
"""From the row id of a completion to that of an attempt at its place; more than a generation batch has rows."""


class InterveningTrainer(LossParts, ABC):
    """TRL's loop, with an intervention between rewards and advantages."""

    intervention: Intervention | None
    spec: DiffusionSpec
    decoding: DecodingConfig
    _current_rollout: Rollout | None
    _replaced_rows: list[int]

    @abstractmethod
    def _decode(
        self, ids: list[list[int]], row_ids: list[int], hints: Sequence[Mapping[int, int]] | None = None
    ) -> Rollout:
        """One completion of each prompt, by the policy as it is."""

    def _bind_intervention(self) -> None:
        """Checks that this run can have the intervention, and tells it about the run."""
        assert self.intervention is not None
        self._check_intervention()
        self.intervention.bind(
            Context(
                tokenizer=self._tokenizer,
                spec=self.spec,
                canvas_length=self.decoding.canvas_length,
                num_generations=self.num_generations,
                reward_names=list(self.reward_func_names),
                seed=self.args.seed,
            )
        )

    def _check_intervention(self) -> None:
        """An intervention sees whole groups, gives slots, and decodes on some processes more than on others."""
        assert self.intervention is not None
        name, args = type(self.intervention).__name__, self.args
        for column in self.intervention.columns:
            check_columns(self.train_dataset, "train_dataset", column)
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % self.num_generations:
            raise ValueError(
                f"{name} needs whole groups on each process, but per_device_train_batch_size="
                f"{args.per_device_train_batch_size} x steps_per_generation={args.steps_per_generation} = {rows} is no "
                f"multiple of num_generations={self.num_generations}"
            )
        if self.spec.noise != "mask":
            raise ValueError(f"{name} gives slots of the canvas, which noise={self.spec.noise!r} would overwrite")
        if getattr(self.decoding.build_schedule(), "moves", False):
            raise ValueError(
                f"{name} gives slots of the canvas, which schedule={self.decoding.schedule!r} cannot have: it changes "
                "the length of the canvas, or takes slots out"
            )
        if self.is_fsdp_enabled or (self._dist.is_zero3 and not args.ds3_gather_for_generation):
            raise ValueError(f"{name} decodes other numbers of rows on each process, which deadlocks sharded rollouts")
        if self._dist.is_zero3 and any(isinstance(f, torch.nn.Module) for f in self.reward_funcs):
            raise ValueError(f"{name} asks for rewards on some processes only, which deadlocks a sharded reward model")

    def _intervene(self, inputs: Any, prompts: Any, completions: list[Any], rewards: Tensor) -> Tensor:
        """Decodes and scores the attempts that the intervention asks for, and puts those that it accepts in place.

        Changes `completions` (which TRL logs) and the current rollout; returns the rewards `[N * G, F]` that count.
        """
        intervention, rollout, size = self.intervention, self._current_rollout, self.num_generations
        assert intervention is not None and rollout is not None
        start = self.accelerator.process_index * len(prompts)
        rewards = rewards[start : start + len(prompts)].clone()  # of this process
        groups = [
            Group(inputs[i], rewards[i : i + size], rollout.row_ids[i : i + size]) for i in range(0, len(prompts), size)
        ]
        hints = [intervention.attempts(group) for group in groups]
        if any(len(given) > size for given in hints):
            raise ValueError(f"{type(intervention).__name__} asks for more attempts than a group has members, {size}")
        rows = [g * size + k for g, given in enumerate(hints) for k in range(len(given))]
        replaced: dict[int, int] = {}
        if self.accelerator.gather(torch.tensor([len(rows)], device=self.accelerator.device)).any():
            ids = [rollout.row_ids[row] + SECOND_ATTEMPT for row in rows]
            flat = [hint for given in hints for hint in given]
            attempts = self._decode([rollout.prompt_ids[row] for row in rows], ids, flat)
            if rows:
                found, extras = self._score_attempts(inputs, prompts, attempts, rows)
                replaced = self._chosen(groups, [len(given) for given in hints], found)
                texts = self._texts(prompts, attempts)
                for row, attempt in replaced.items():
                    rewards[row], completions[row] = found[attempt], texts[attempt]
                self._current_rollout = rollout = rollout.replaced(replaced, attempts)
                self._replace_extras(extras, replaced, rollout)
        self._replaced_rows = sorted(replaced)
        self._log_metric("intervention/group_share", sum(map(bool, hints)) / len(hints))
        self._log_metric("intervention/row_share", len(replaced) / len(prompts))
        if self.args.log_completions:
            self._log_completion_extra("replaced", [row in replaced for row in range(len(prompts))])
        gathered: Tensor = self.accelerator.gather(rewards)
        return gathered

    def _chosen(self, groups: list[Group], counts: list[int], rewards: Tensor) -> dict[int, int]:
        """Which attempt takes the place of which row, by the rewards `[A, F]` of attempts, `counts` for each group."""
        assert self.intervention is not None
        replaced: dict[int, int] = {}
        first = 0
        for g, (group, count) in enumerate(zip(groups, counts, strict=True)):
            chosen = self.intervention.replacements(group, rewards[first : first + count]) if count else {}
            replaced |= {g * self.num_generations + member: first + attempt for member, attempt in chosen.items()}
            first += count
        return replaced

    def _score_attempts(
        self, inputs: Any, prompts: Any, attempts: Rollout, rows: list[int]
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """Rewards `[A, F]` of completions decoded in place of some rows, and the columns that reward functions log."""
        pending, metrics = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs: Any = defaultdict(list)
        self._pending_metrics: Any = defaultdict(list)
        asked = [prompts[row] for row in rows], self._texts(prompts, attempts), attempts.completion_ids
        try:
            with swapped(grpo, "gather", lambda values: values):  # other processes score another number, or none
                found = super()._calculate_rewards(with_rollout([inputs[row] for row in rows], attempts), *asked)
            return found, dict(self._pending_extra_logs)
        finally:
            self._pending_extra_logs, self._pending_metrics = pending, metrics

    def _replace_extras(self, extras: dict[str, list[Any]], replaced: dict[int, int], rollout: Rollout) -> None:
        pending = self._pending_extra_logs
        for column, values in extras.items():
            kept = pending[column] or [None] * len(rollout)
            pending[column] = [values[replaced[i]] if i in replaced else value for i, value in enumerate(kept)]
        if self.args.log_completions:
            pending["nfe"], pending["stop_reason"] = rollout.nfe.tolist(), list(rollout.stop_reason)

    def _texts(self, prompts: list[Any], rollout: Rollout) -> list[Any]:
        """Completions as TRL hands them to reward functions: text, or a chat message where prompts are chats."""
        completion_ids = rollout.completion_ids
        if not grpo.is_conversational({"prompt": prompts[0]}):
            texts: list[Any] = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
            return texts
        names = ("response_template", "response_schema")
        if any(getattr(self._tokenizer, name, None) is not None for name in names):
            pairs = zip(completion_ids, rollout.prompt_ids, strict=True)
            return [
                [grpo.parse_response(self._tokenizer, ids, prefix=prompt, tools=self.tools)] for ids, prompt in pairs
            ]
        contents = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": content}] for content in contents]

    def _with_completions(self, batch: dict[str, Any], rollout: Rollout) -> None:
        """Puts the completions that count into a batch that TRL made from those that were decoded first."""
        valid, canvas = batch["canvas_valid"], batch["canvas_ids"]
        width, multiple = int(valid.sum(-1).max()), self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        last = canvas.gather(1, valid.sum(-1, keepdim=True) - 1)
        ended = torch.isin(last, torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device))
        mask = valid & ended if self.mask_truncated_completions else valid
        batch["completion_ids"] = resized(canvas.masked_fill(~valid, self._tokenizer.pad_token_id), width)
        batch["completion_mask"] = resized(mask.long(), width)
        self._log_lengths(valid.sum(-1), ended.squeeze(-1))

    def _log_lengths(self, lengths: Tensor, ended: Tensor) -> None:
        """TRL's metrics of completions, again for those that count, from lengths `[B]` and whether they have ended."""
        lengths, ended = self.accelerator.gather(lengths).float(), self.accelerator.gather(ended)
        logged = self._metrics["train"]
        logged["completions/clipped_ratio"][-1] = 1 - ended.float().mean().item()
        terminated = lengths[ended] if ended.any() else torch.zeros(1)
        for kind, values in (("length", lengths), ("terminated_length", terminated)):
            for name, value in (("mean", values.mean()), ("min", values.min()), ("max", values.max())):
                logged[f"completions/{name}_{kind}"][-1] = value.item()


def places(row_ids: Tensor) -> Tensor:
    """In which order rows with these ids, long `[B]`, were asked for, whether or not they were replaced since; `[B]`.

    Completions of a group are next to each other; a replacement counts as the member of its group that it was decoded
    for, so that two of a group may have one place.
    """
    return row_ids % SECOND_ATTEMPT


def groups(row_ids: Tensor, size: int) -> Tensor:
    """The id of the first row of each row's group of `size` completions, as it was asked for; long `[B]`.

    Rows that were replaced since belong to the group that they were decoded for.
    """
    return row_ids - row_ids // SECOND_ATTEMPT % 2 * SECOND_ATTEMPT - places(row_ids) % size
