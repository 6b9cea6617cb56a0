"""The policy as rollouts are decoded by it: whole on each process, or in step with those that hold its other parts.

TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from trl import GRPOTrainer

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules import registry
from rl4dlm.training.contract import check_contract
from rl4dlm.training.loss_parts import LossParts

check_contract(GRPOTrainer, parameters={}, attributes=["_dist"], module=grpo, names=["unwrap_model_for_generation"])


class DecoderTrainer(LossParts):
    """Lends the policy to whatever runs forwards of it without gradients."""

    spec: DiffusionSpec
    decoding: DecodingConfig

    @contextmanager
    def _policy_that_decodes(self) -> Iterator[Any]:
        """The policy as it is, unwrapped. All processes enter it together."""
        with (
            grpo.unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            yield model

    @property
    def _sharded(self) -> bool:
        """Whether the model is sharded over processes while it decodes, so that all must make each forward of it."""
        return self.is_fsdp_enabled or (self._dist.is_zero3 and not self.args.ds3_gather_for_generation)

    @property
    def _forwards_differ(self) -> bool:
        """Whether processes may need different numbers of forwards of a sharded model, each of which all must make."""
        fixed = registry.lookup(self.decoding.schedule).fixed_forwards and not self.decoding.stop_at_eos
        return self._sharded and not (fixed and self.spec.attention == "full")

    def _any_process(self, working: bool) -> bool:
        """Whether any process says True; all call it together."""
        count = torch.tensor(float(working), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum") > 0)
