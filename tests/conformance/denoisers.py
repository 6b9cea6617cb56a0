"""The recorded model as a stock transformers class, in float64 throughout.

A stock model in float64 still computes norms and rotary angles in float32, which moves this model's logits by 2.6e-6:
more than the tolerance of the recorded numbers.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from tests.conformance.cases import Case, folder
from tests.models.float64 import exactly_float64


def spec_of(case: Case) -> DiffusionSpec:
    """The ids that a case was recorded with; what it does not say is as the model's configuration says."""
    config = _config()
    eos = case.settings.get("eos_id", config.get("eos_token_id"))
    mask = case.settings.get("mask_id", config.get("mask_token_id"))
    # Dream, and DiffuCoder after it, predict the next token, as the causal model that they came from.
    shift = int(str(case.settings.get("shift", "")).lower().startswith("dream") or case.family in ("dream", "coupled"))
    shift = int(case.settings.get("logit_shift", shift))
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    return DiffusionSpec(mask_token_id=mask, eos_token_ids=eos, logit_shift=shift, **_blocks_of(case))


def _blocks_of(case: Case) -> dict[str, Any]:
    """The block attention of families that score a noisy copy beside a clean one."""
    if case.family == "ebpo":
        origin = {"global": "position_zero", "response": "response"}[case.settings["block_origin"]]
        return {"attention": "block_causal", "block_length": case.settings["block_length"], "grid_origin": origin}
    if case.family == "lightningrl" and "block_size" in case.settings:
        blocks = {"block_length": case.settings["block_size"], "grid_origin": "position_zero"}
        return {"attention": "block_causal", **blocks}
    return {}


def denoiser(case: Case, name: str = "model") -> LlamaForCausalLM:
    """The model that a case was recorded with (`name="ref_model"`: the reference policy), scoring attached."""
    return _shared(name, spec_of(case), case.compute_dtype)


def build(name: str, spec: DiffusionSpec, dtype: str) -> LlamaForCausalLM:
    """A model of its own, for tests that change it or take gradients."""
    # No padding id: it would take the gradient from its embedding, and the references attend to padding.
    own = {"is_causal": False, "use_cache": False, "pad_token_id": None, "diffusion": spec.to_dict()}
    values = {**_config(), **own}
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(**values)).to(getattr(torch, dtype))
    model.load_state_dict(load_file(folder() / f"{name}.safetensors"))
    if model.dtype == torch.float64:
        exactly_float64(model)
    return attach_scoring(model.eval())


_shared = functools.lru_cache(maxsize=8)(build)


def _config() -> dict[str, Any]:
    config = json.loads((folder() / "config.json").read_text(encoding="utf-8"))
    config.pop("model_type", None)
    return config
