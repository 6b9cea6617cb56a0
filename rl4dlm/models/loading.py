"""Loads and saves denoisers: folders whose stock transformers class and `config.diffusion` say all, and PEFT adapters.

Owns the way between disk and a plain `PreTrainedModel`. Training code, tokenization and decoding live elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from rl4dlm.models.spec import DiffusionSpec


def load_denoiser(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a denoiser from a folder or a hub id, without remote code.

    Args:
        path: a model folder or hub id with a stock architecture and `config.diffusion`, or a PEFT adapter folder whose
            base model is one.
        dtype: a torch dtype, its name, or `"auto"` for the one it was saved in.
        device: where to put it; None leaves it where transformers loads it (the CPU, or as `device_map` says).
        attn_implementation: `"sdpa"`, `"eager"`, `"flex_attention"` or a flash attention; None for the default.
        quantization_config: a transformers quantization configuration.
        revision: of a hub id.
        kwargs: passed on to `from_pretrained`.

    Returns:
        A `PreTrainedModel`, or a `PeftModel` (trainable) for an adapter folder.

    Raises:
        ValueError: the checkpoint has no `config.diffusion`, is causal, or asks for remote code.
        FileNotFoundError: `path` looks like a local path and is not there.
    """
    path = os.fspath(path)
    if kwargs.pop("trust_remote_code", None):
        raise ValueError("trust_remote_code=True is not supported: denoisers load into stock transformers classes")
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"there is no model folder {path!r}")
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "revision": revision, **kwargs}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    options = {name: value for name, value in options.items() if value is not None}

    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        return _load_adapter(path, adapter, device, options)

    config = AutoConfig.from_pretrained(path, revision=revision) if revision else AutoConfig.from_pretrained(path)
    if getattr(config, "diffusion", None) is None:
        raise ValueError(
            f"{path}: config.json has no `diffusion` entry, so it is not known how this model denoises. "
            "Add one with `DiffusionSpec(...).to_dict()` and save it with `save_denoiser`."
        )
    DiffusionSpec.from_dict(config.diffusion)
    if getattr(config, "is_causal", True):
        raise ValueError(f"{path}: config.json must say `is_causal: false`; as it is, attention would be causal")
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig()
    return model if device is None else model.to(device)


def save_denoiser(model: Any, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Writes a model (or the adapter of a `PeftModel`) and its spec, and the tokenizer if given.

    The folder appears under its name only when complete. `AutoModelForCausalLM.from_pretrained(path)` gives
    bit-identical logits. Raises ValueError for a model without a spec and FileExistsError if `path` is a file or a
    non-empty folder that does not hold a model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    DiffusionSpec.of(base)
    target = Path(path)
    is_model = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not is_model and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and holds no model; it will not be overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if target.exists():
            retired = folder.with_name(folder.name + ".old")
            os.replace(target, retired)
            os.replace(folder, target)
            shutil.rmtree(retired)
        else:
            os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_tokenizer(tokenizer: Any, spec: DiffusionSpec) -> None:
    """Raises ValueError when a tokenizer does not fit a spec: no mask token, another one, or no padding."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ValueError(
            f"tokenizer {name!r} has no mask token. Set it to the token with id {spec.mask_token_id}: "
            "`tokenizer.add_special_tokens({'mask_token': ...})`"
        )
    if tokenizer.mask_token_id != spec.mask_token_id:
        raise ValueError(
            f"tokenizer {name!r} has mask_token_id={tokenizer.mask_token_id}, but the model was trained with "
            f"mask_token_id={spec.mask_token_id}"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == spec.mask_token_id:
        raise ValueError(f"tokenizer {name!r} pads with its mask token (id {spec.mask_token_id}); choose another one")


def _load_adapter(path: str, adapter: Path, device: Any, options: dict[str, Any]) -> Any:
    from peft import PeftModel

    base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} names no base_model_name_or_path, so its base model is not known")
    model = load_denoiser(base, device=device, **options)
    return PeftModel.from_pretrained(model, path, is_trainable=True)
