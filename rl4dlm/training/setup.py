"""Makes a denoiser ready for a TRL trainer, and a TRL trainer ready for a denoiser.

Owns what happens to a model before it is wrapped. Loading is `rl4dlm.models.loading`'s, wrapping TRL's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.uniform import UniformMeanField, UniformNoise
from rl4dlm.models import tokens
from rl4dlm.models.adapters import base_model, check_adapter
from rl4dlm.models.canvas import denoises_canvases
from rl4dlm.models.families import FAMILIES
from rl4dlm.models.family import RECORD
from rl4dlm.models.loading import load_tokenizer, local_folder
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.unmasking import ATTRIBUTE
from rl4dlm.rollout.policies.policy import UnmaskingPolicy, attach_policy, attached_policy


def prepared(model: Any, peft_config: Any = None) -> Any:
    """The model (or `PeftModel`) itself, with scoring attached and what TRL reads from it set.

    Args:
        model: with a spec.
        peft_config: of the adapter that it is going to get, if any.

    Raises:
        ValueError: it has no spec, its attention is causal, the adapter cannot reach what it names, or one that it has
            is on its unmasking policy, too.
    """
    base = base_model(model)
    spec = DiffusionSpec.of(base)
    if getattr(base.config, "is_causal", True) and not denoises_canvases(base):  # whose encoder is causal
        raise ValueError(f"{type(base).__name__} has config.is_causal=True, or none; a denoiser needs is_causal=False")
    if getattr(base, "generation_config", None) is None:  # transformers sets none on models that cannot generate
        base.generation_config = GenerationConfig()
    base.generation_config.eos_token_id = list(spec.eos_token_ids)
    base.value_head = None  # of an earlier training, which nothing would ask
    policy = attached_policy(base)
    if policy is not None:
        policy.requires_grad_(False)  # unless an algorithm trains it
        keep_adapter_off(policy, peft_config)
    check_adapter(base, peft_config)
    tokens.train_end_tokens(base)
    return attach_scoring(model)


def keep_adapter_off(policy: UnmaskingPolicy, peft_config: Any) -> None:
    """Has an adapter that a model is going to get leave out the policy on it, whose file has no place for adapters.

    Raises ValueError where one is there already.
    """
    if any(isinstance(part, BaseTunerLayer) for part in policy.modules()):
        raise ValueError(
            "the model's adapter is on its unmasking policy, too, which is saved without it; attach the policy behind "
            "the adapter, or give the adapter exclude_modules"
        )
    if not hasattr(peft_config, "exclude_modules"):
        return
    given = peft_config.exclude_modules
    if isinstance(given, str):
        peft_config.exclude_modules = rf"(?:{given})|(?:.*\.)?{ATTRIBUTE}\..*"
    else:
        inside = [f"{ATTRIBUTE}.{name}" for name, _ in policy.named_modules() if name]
        peft_config.exclude_modules = [*(given or ()), *inside]


def tokenizer_for(model: Any, options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer saved with a model, its mask token set. TRL's own way does not know the published forms.

    Args:
        model: a path or hub id, or a model that was loaded from one.
        options: of loading, where `model` is a path.

    Raises:
        ValueError: as `load_tokenizer`; and for a model that was made in memory.
    """
    if isinstance(model, str):
        given = {name: value for name, value in (options or {}).items() if name in ("revision", "mask_token_id")}
        return load_tokenizer(model, **given)
    base = base_model(model)
    if not base.name_or_path:
        raise ValueError("processing_class=None needs a model that was loaded from a folder or the hub; pass one")
    # The model's own spec counts, not what its folder says: it may have been set in memory.
    family = FAMILIES.get((getattr(base.config, RECORD, None) or {}).get("family", ""))
    return tokens.load_tokenizer(local_folder(base.name_or_path), family, DiffusionSpec.of(base).mask_token_id)


def mean_field(model: Any, p_mask_prompt: float, scope: str) -> Estimator:
    """The mean-field estimator for a model's noise."""
    base = base_model(model)
    if DiffusionSpec.of(base).noise == "uniform":
        return UniformMeanField(p_mask_prompt, scope, vocabulary_size=base.config.get_text_config().vocab_size)
    return MeanField(p_mask_prompt, scope)


def of_noise(model: Any, estimator: Estimator) -> Estimator:
    """An estimator that hides tokens behind a mask, for a model's noise: as it is, or with random tokens there."""
    base = base_model(model)
    if DiffusionSpec.of(base).noise == "uniform":
        return UniformNoise(estimator, base.config.get_text_config().vocab_size)
    return estimator


def copy_of(model: Any) -> Any:
    """A second model with the same weights, dtype and device, and with a copy of the unmasking policy.

    Not `copy.deepcopy`: the copy of a model with scoring attached would compute with the original's weights.
    """
    with torch.random.fork_rng(devices=[]):  # building a model draws weights
        twin = type(model)(copy.deepcopy(model.config))
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.to(model.device)
    policy = attached_policy(model)
    if policy is not None:
        attach_policy(twin, copy.deepcopy(policy))
    if getattr(model, "loaded_from", None) is not None:
        twin.loaded_from = model.loaded_from
    return prepared(twin)


@contextmanager
def swapped(owner: object, name: str, value: Any) -> Iterator[None]:
    """Replaces a name of a module or an attribute of an object for the time being."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
