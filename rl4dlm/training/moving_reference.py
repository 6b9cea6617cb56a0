"""A reference model that follows the policy (`sync_ref_model`) as a part of checkpoints.

Which weights it has is a matter of the whole run so far, so that a run that is resumed must read them: the model before
training, which TRL starts with again, is another teacher. Owns the file, and when it is written and read.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

from rl4dlm.training.contract import check_contract

logger = logging.getLogger(__name__)

check_contract(
    Trainer,
    parameters={"_load_optimizer_and_scheduler": ["checkpoint"], "_save_rng_state": ["output_dir"]},
)

REFERENCE_FILE = "reference.safetensors"


def is_sharded(model: Any) -> bool:
    """Whether a process has only a part of the weights."""
    return any(hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in model.parameters())


def save_reference(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes the weights of an unwrapped reference, whole."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, Path(folder) / REFERENCE_FILE)


@torch.no_grad()
def load_reference(model: Any, folder: str | os.PathLike[str]) -> bool:
    """Reads them, and says whether there were any. ValueError for those of another model."""
    path = Path(folder) / REFERENCE_FILE
    if not path.is_file():
        return False
    found, own = load_file(path), dict(model.named_parameters())
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (found, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} is of another reference model than this run's")
    for name, value in found.items():
        own[name].copy_(value)
    return True


class MovingReferenceTrainer(Trainer):
    """A trainer with TRL's `ref_model` whose checkpoints hold it where `sync_ref_model` moves it."""

    ref_model: Any

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every rank, before the file that makes a checkpoint complete is written.
        super()._save_rng_state(output_dir)
        reference = self._moving_reference()
        if reference is not None and self.args.should_save and not self._reference_is_sharded(reference):
            save_reference(reference, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        reference = None if checkpoint is None else self._moving_reference()
        if checkpoint is None or reference is None:
            return
        if self._reference_is_sharded(reference) or not load_reference(reference, checkpoint):
            logger.warning(
                "%s does not hold the reference model that sync_ref_model has made, which is not saved where it is "
                "sharded (FSDP, ZeRO-3): until it is synchronised next, the reference is the model before training",
                checkpoint,
            )

    def _moving_reference(self) -> Any:
        """The reference, if it follows the policy."""
        args: Any = self.args
        moves = args.sync_ref_model and self.ref_model is not None
        return self.accelerator.unwrap_model(self.ref_model) if moves else None

    def _reference_is_sharded(self, reference: Any) -> bool:
        return self.is_fsdp_enabled or is_sharded(reference)
