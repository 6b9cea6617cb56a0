"""A reference model that follows the policy (`sync_ref_model`) as a part of checkpoints.

Which weights it has is a matter of the whole run so far, so that a run that is resumed must read them: the model before
training, which TRL starts with again, is another teacher. Owns the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

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
