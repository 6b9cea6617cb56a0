"""Makes a denoiser ready for a TRL trainer, and a TRL trainer ready for a denoiser.

Owns what happens to a model before it is wrapped. Loading is `rl4dlm.models.loading`'s, wrapping TRL's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers import GenerationConfig

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec


def prepared(model: Any) -> Any:
    """The model (or `PeftModel`) itself, with scoring attached and what TRL reads from it set.

    Raises:
        ValueError: it has no spec, or its attention is causal.
    """
    base = base_model(model)
    spec = DiffusionSpec.of(base)
    if getattr(base.config, "is_causal", True):
        raise ValueError(f"{type(base).__name__} has config.is_causal=True, or none; a denoiser needs is_causal=False")
    if getattr(base, "generation_config", None) is None:  # transformers sets none on models that cannot generate
        base.generation_config = GenerationConfig()
    base.generation_config.eos_token_id = list(spec.eos_token_ids)
    return attach_scoring(model)


def base_model(model: Any) -> Any:
    """The `PreTrainedModel` inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def copy_of(model: Any) -> Any:
    """A second model with the same weights, dtype and device.

    Not `copy.deepcopy`: the copy of a model with scoring attached would compute with the original's weights.
    """
    with torch.random.fork_rng(devices=[]):  # building a model draws weights
        twin = type(model)(copy.deepcopy(model.config))
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.to(model.device)
    return prepared(twin)


@contextmanager
def swapped(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replaces a name in a module for the time being."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
