"""The exact check of supervised training: how often a task is solved, measured at each evaluation.

Owns how a model that is trained on examples decodes for it; the rest is `rl4dlm.training.exact_check`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.tasks.base import Task
from rl4dlm.tasks.prompts import encode_prompt
from rl4dlm.training.checkpoints import CheckpointingTrainer
from rl4dlm.training.exact_check import CheckingTrainer, by_steps


class CheckedTrainer(CheckingTrainer, CheckpointingTrainer):
    """A trainer on examples that can be checked."""

    spec: DiffusionSpec

    def check_exactly(
        self,
        task: Task,
        decoding: DecodingConfig,
        *,
        split: str = "validation",
        steps: Sequence[int] | None = None,
        limit: int | None = None,
    ) -> None:
        """As a policy's, see `ExactCheckTrainer.check_exactly`, with the same metrics.

        Args:
            decoding: how completions are decoded. steps: numbers of steps in its place; None: its own.

        Raises:
            ValueError: evaluation is switched off, the model is sharded over processes, or a setting that is not
                allowed.
        """
        if self.holds_part_of_the_model():
            raise ValueError(
                "an exact check of supervised training needs the whole model on each process; use DDP or ZeRO-2, or "
                "measure checkpoints with `rl4dlm eval`"
            )
        counts = [decoding.steps] if steps is None else steps
        self._set_check(task, split, limit, by_steps(decoding, counts), self.spec)

    def holds_part_of_the_model(self) -> bool:
        """Whether a process has a part of the weights only: FSDP and ZeRO-3."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return bool(self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))

    @contextmanager
    def _checked_model(self) -> Iterator[Any]:
        with torch.no_grad(), self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.model)

    def _checked_ids(self, prompts: list[Any]) -> list[list[int]]:
        return [encode_prompt(self._tokenizer, prompt) for prompt in prompts]
