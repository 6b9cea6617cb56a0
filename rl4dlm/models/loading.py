"""Loads denoisers: our form, the published form of every family, and PEFT adapters; and their tokenizers.

Owns the way from disk to a plain `PreTrainedModel`, and never runs remote code. Our form is a stock class with
`config.diffusion`; a published form is what a family of `families/` describes. Writing is `saving.py`'s, training code
and decoding live elsewhere.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from rl4dlm.models import tokens
from rl4dlm.models.adapters import experts_of, quantized_share
from rl4dlm.models.checkpoint import (
    Checkpoint,
    LazyTensor,
    checked_files,
    dtype_name,
    listed,
    opened,
    read_json,
    stated_files,
    unfinite,
)
from rl4dlm.models.families import FAMILIES, find_family
from rl4dlm.models.family import RECORD, Family, HubConfig, said
from rl4dlm.models.left_to_right import refuse_generate
from rl4dlm.models.saving import save_denoiser as save_denoiser
from rl4dlm.models.spec import DiffusionSpec, lacks_mask_token
from rl4dlm.models.unmasking import POLICY_FILE, policy_file

log = logging.getLogger(__name__)

_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_DOWNLOAD_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")


def load_denoiser(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a denoiser from a folder or a hub id, without remote code.

    Args:
        path: a model in our form (a stock architecture and `config.diffusion`), a published checkpoint of a known
            family as it is, or a PEFT adapter folder whose base model is one of these.
        dtype: a torch dtype, its name, or `"auto"` for the one it was saved in.
        device: where to put it; None leaves it where transformers loads it (the CPU, or as `device_map` says).
        attn_implementation: `"sdpa"`, `"eager"`, `"flex_attention"` or a flash attention; None for the default.
        quantization_config: a transformers quantization configuration.
        revision: of a hub id.
        mask_token_id: for a checkpoint whose files do not state it.
        block_length: in tokens, for a block-diffusion checkpoint whose files do not state it.
        kwargs: passed on to `from_pretrained`.

    Returns:
        A `PreTrainedModel`, or a `PeftModel` (trainable) for an adapter folder. Its `generate`, which writes left to
        right, is refused.

    Raises:
        ValueError: an unknown architecture; a setting under which no stock class computes the same; missing, extra or
            misshapen tensors; weights that are NaN or infinite; damaged files; ids or a block length that contradict
            the checkpoint; remote code. The message names the file and the key.
        FileNotFoundError: there is no such folder or hub model, an adapter's base included, or a file of the checkpoint
            is missing.
    """
    path = os.fspath(path)
    if kwargs.pop("trust_remote_code", None):
        raise ValueError("trust_remote_code=True is not supported: denoisers load into stock transformers classes")
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    options = {name: value for name, value in options.items() if value is not None}
    given = {"mask_token_id": mask_token_id, "block_length": block_length}
    folder = local_folder(path, revision, **{name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs})

    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return _load_adapter(folder, adapter, device, {**options, **given})

    hub = _read_config(folder)
    if hub.get("diffusion") is None:
        model = _load_published(find_family(hub), hub, folder, given, options)
    else:
        model = _load_own(hub, folder, given, options)
    # The name a trainer, a reference model and an adapter ask for again; the cache folder of a download is not it.
    # A folder keeps its name wherever it is asked for from, since an adapter's files name its base by it.
    model.config._name_or_path = model.name_or_path = os.path.abspath(path) if os.path.isdir(path) else path
    model.loaded_from = os.path.abspath(folder)  # where what is saved beside a model lies
    model.__dict__.pop("_weight_conversions", None)  # else saving would undo how this folder happened to be read
    check_finite(model, path)
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig()
    tokens.train_end_tokens(model)
    refuse_generate(model)
    if model.dtype == torch.float64 and experts_of(model):
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    if quantization_config is not None:
        quantized, total = quantized_share(model)
        log.log(
            logging.WARNING if quantized < total / 2 else logging.INFO,
            "%s: %.0f %% of %d parameters are quantized; fused experts and the vocabulary never are",
            path,
            100 * quantized / total,
            total,
        )
    return model if device is None else model.to(device)


def load_tokenizer(
    path: str | os.PathLike[str], revision: str | None = None, *, mask_token_id: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint in either form, its mask token set and padding on the left; never remote code.

    Args:
        path: a folder or hub id; an adapter folder without a tokenizer has its base model's. No weights are read.
        revision: of a hub id.
        mask_token_id: for a checkpoint whose files do not state it.

    Raises:
        ValueError: the mask token is not known, or the tokenizer lacks it or names another one than the model.
        FileNotFoundError: there is no such folder.
    """
    folder = local_folder(path, revision)
    adapter = folder / "adapter_config.json"
    model = _base_folder(adapter) if adapter.is_file() else folder
    hub = _read_config(model)
    given = {"mask_token_id": mask_token_id}
    family = find_family(hub) if hub.get("diffusion") is None else None
    stated = _own_spec(hub, given) if family is None else _published_spec(family, hub, model, given)
    spec = DiffusionSpec.from_dict(stated)
    own = adapter.is_file() and (folder / "tokenizer_config.json").is_file()
    # A folder in our form remembers its family: its tokenizer files may have been copied from the published one.
    known = family or FAMILIES.get((hub.get(RECORD) or {}).get("family", ""))
    tokenizer = tokens.load_tokenizer(folder if own else model, known, spec.mask_token_id)
    check_tokenizer(tokenizer, spec)
    return tokenizer


def check_tokenizer(tokenizer: Any, spec: DiffusionSpec) -> None:
    """Raises ValueError when a tokenizer does not fit a spec: no mask token, another one, or no padding."""
    if spec.noise != "mask":
        return
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ValueError(
            f"tokenizer {name!r} has no mask token. Set it to the token with id {spec.mask_token_id}: "
            "`tokenizer.add_special_tokens({'mask_token': ...})`, or load it with `load_tokenizer`"
        )
    if tokenizer.mask_token_id != spec.mask_token_id:
        raise ValueError(
            f"tokenizer {name!r} has mask_token_id={tokenizer.mask_token_id}, but the model was trained with "
            f"mask_token_id={spec.mask_token_id}"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == spec.mask_token_id:
        raise ValueError(f"tokenizer {name!r} pads with its mask token (id {spec.mask_token_id}); choose another one")


# --- reading ----------------------------------------------------------------------------------------------------------


def local_folder(path: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Path:
    """The local folder of a path or hub id; a hub id is downloaded or taken from the cache.

    Raises FileNotFoundError, naming it, for what is neither. A name with one slash is a local path where the folder
    before the slash exists, unless a revision says that the hub is meant. `options` are `snapshot_download`'s.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return Path(path)
    where = f"looked in {os.getcwd()}"
    parent = os.path.dirname(path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path):
        raise FileNotFoundError(f"there is no model folder {path!r} ({where})")
    if parent and os.path.isdir(parent) and revision is None:
        raise FileNotFoundError(
            f"there is no model folder {path!r}, although there is a folder {parent!r} ({where}). If the hub's model "
            "of this name is meant, pass revision='main'"
        )
    patterns = [*_DOWNLOADED, *options.pop("more_files", ())]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, **options))
    except Exception as error:  # the hub's errors have several types, and some name neither the model nor the hub
        raise FileNotFoundError(
            f"there is no model {path!r}: it is no folder ({where}), and the hub did not give it "
            f"({type(error).__name__}: {said(error)[:300]})"
        ) from error


def check_finite(model: Any, path: str) -> None:
    """Raises ValueError, naming them, when weights are NaN or infinite."""
    names = unfinite(model.named_parameters())
    if names:
        raise ValueError(
            f"{path}: {listed(names)} NaN or infinite somewhere, so nothing that the model says would mean anything; "
            "take an earlier checkpoint, or download it again"
        )


def _read_config(folder: Path) -> HubConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder} holds no model")
    return HubConfig(read_json(file), str(file))


def _stock_config(folder: Path) -> PreTrainedConfig:
    """As transformers reads it. Raises ValueError, naming the file, where that fails."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of several types, and without the file
        raise ValueError(f"{folder / 'config.json'} cannot be read: {said(error)}") from error
    return config


def _own_spec(hub: HubConfig, given: dict[str, int | None]) -> dict[str, Any]:
    """`diffusion` of a configuration in our form, with what the user adds to it."""
    spec = dict(hub["diffusion"])
    for key, value in given.items():
        if value is None:
            continue
        if spec.get(key) not in (None, value):
            raise ValueError(f"{key}={value} contradicts {hub.path}: `diffusion.{key}` is {spec[key]}; leave it out")
        spec[key] = value
    return spec


def _published_spec(family: Family, hub: HubConfig, folder: Path, given: dict[str, int | None]) -> dict[str, Any]:
    for key in family.needed:
        hub.need(key)
    rows = hub["text_config"]["vocab_size"] if family.native else family.stock_config(hub).vocab_size
    return tokens.resolve_spec(family, hub, folder, rows, given)


def _load_own(hub: HubConfig, folder: Path, given: dict[str, int | None], options: dict[str, Any]) -> Any:
    spec = _own_spec(hub, given)
    native = next((f for f in FAMILIES.values() if f.native and hub.get("model_type") in f.model_types), None)
    if native is None and hub.get("is_causal", True):
        raise ValueError(f"{folder}: config.json must say `is_causal: false`; as it is, attention would be causal")
    config = _stock_config(folder)
    config.diffusion = spec
    if not lacks_mask_token(config):
        tokens.check_spec(hub.path, spec)
    rows = config.get_text_config().vocab_size
    if spec.get("mask_token_id") is not None and spec["mask_token_id"] >= rows:
        raise ValueError(
            f"{hub.path}: `diffusion.mask_token_id` is {spec['mask_token_id']}, but the embedding has {rows} rows; set "
            "it to the id of the mask token"
        )
    loader = AutoModelForCausalLM if native is None else native.model_class
    return _load_stock(loader, folder, config, options)


def _load_published(
    family: Family, hub: HubConfig, folder: Path, given: dict[str, int | None], options: dict[str, Any]
) -> Any:
    spec = _published_spec(family, hub, folder, given)
    config = _stock_config(folder) if family.native else family.stock_config(hub)
    config.diffusion = spec
    text = config.get_text_config()
    record: dict[str, Any] = {"family": family.name, "config": dict(hub)}
    record["given"] = [
        family.block_key if name == "block_length" else name for name, value in given.items() if value is not None
    ]
    generation = folder / "generation_config.json"
    if generation.is_file():
        record["generation_config"] = read_json(generation)
    setattr(config, RECORD, record)
    with Checkpoint(folder) as checkpoint:
        record["dtype"], record["dtypes"] = dtype_name(checkpoint.dtype), checkpoint.exceptions()
        if family.native:
            return _load_stock(family.model_class, folder, config, options)
        shapes, tied = family.stock_shapes(config)
        layout = family.tensors(shapes)
        optional = [name for name, parts in layout.items() if parts[0].tensor in tied]
        checkpoint.check(layout, shapes, family.stock, optional)
        record["tied_stored"] = [name for name in optional if name in checkpoint.tensors]
        if options.get("dtype") == "auto":
            options = {**options, "dtype": checkpoint.dtype}
        state = {n: t for n, t in checkpoint.lazy(layout, shapes).items() if n not in tied}
        model = family.model_class.from_pretrained(None, config=config, state_dict=_readable(state), **options)
    generated = record.get("generation_config") or {}
    eos = spec["eos_token_ids"] or None
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, pad_token_id=generated.get("pad_token_id", text.pad_token_id), eos_token_id=eos
    )
    return model


def _load_stock(loader: Any, folder: Path, config: PreTrainedConfig, options: dict[str, Any]) -> Any:
    """A folder that transformers reads by itself, which would initialise what is missing and skip what is extra."""
    if any(folder.glob("*.safetensors*")) or (not any(folder.glob("*.bin*")) and "gguf_file" not in options):
        for name in checked_files(folder, stated_files(folder)):
            opened(folder / name)
    try:
        model, report = loader.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except KeyError as error:  # for example a rope type, of which transformers says no more than its name
        raise ValueError(f"{folder / 'config.json'}: {error} is nothing that {config.model_type!r} knows") from error
    problems = {
        "missing": sorted(report["missing_keys"]),
        "not in the model that config.json describes": sorted(report["unexpected_keys"]),
        "of another shape than config.json says": sorted(str(key[0]) for key in report["mismatched_keys"]),
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"{folder}: {listed(names)} {problem}; use the weights and the config.json that belong together"
            )
    return model


def _readable(state: dict[str, LazyTensor]) -> dict[str, Any]:
    """Under ZeRO-3 transformers wants tensors, with values on the first process only; else they are read one by one."""
    if not is_deepspeed_zero3_enabled():
        return dict(state)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return {n: t[...] if first else torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}


def _load_adapter(folder: Path, adapter: Path, device: Any, options: dict[str, Any]) -> Any:
    from peft import PeftModel

    base = load_denoiser(_base_folder(adapter, named=True), device=device, **options)
    model: Any = PeftModel.from_pretrained(base, os.fspath(folder), is_trainable=True)
    for settings in model.peft_config.values():  # what it is saved with again
        settings.base_model_name_or_path = base.name_or_path
    model.loaded_from = os.path.abspath(folder)
    if policy_file(model) == Path(model.loaded_from, POLICY_FILE):
        base.loaded_from = model.loaded_from  # what merging leaves of the adapter still has its policy
    check_finite(model, os.fspath(folder))
    return model


def _base_folder(adapter: Path, named: bool = False) -> Any:
    """The folder of an adapter's base, or with `named` its name where it is a hub id.

    Older adapters name their base from where they were trained: it is looked for from here, then from every folder
    above the adapter.
    """
    base = read_json(adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} names no base_model_name_or_path, so its base model is not known")
    base = str(base)
    for start in (Path(), *adapter.absolute().parents):
        if os.path.isdir(os.path.join(start, base)):
            return os.path.abspath(os.path.join(start, base)) if named else Path(start, base)
    try:
        found = local_folder(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter}: `base_model_name_or_path` is {base!r}, the model that the adapter was trained on, and it is "
            f"not there: {error}. Put it there, or correct the entry"
        ) from error
    return base if named else found
