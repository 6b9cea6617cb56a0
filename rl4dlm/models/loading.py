"""Loads and saves denoisers: our form, the published form of every family, and PEFT adapters.

Owns the way between disk and a plain `PreTrainedModel`, and never runs remote code. Our form is a stock class with
`config.diffusion`; a published form is what a family of `families/` describes. Training code and decoding live
elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from rl4dlm.models import tokens
from rl4dlm.models.adapters import experts_of, quantized_share
from rl4dlm.models.checkpoint import Checkpoint, LazyTensor, dtype_name, listed, write_checkpoint
from rl4dlm.models.families import FAMILIES, find_family
from rl4dlm.models.family import RECORD, Family, HubConfig
from rl4dlm.models.forms import FORMS
from rl4dlm.models.layout import Layout
from rl4dlm.models.left_to_right import refuse_generate
from rl4dlm.models.spec import DiffusionSpec

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
            misshapen tensors; ids or a block length that contradict the checkpoint; remote code. The message names the
            file and the key.
        FileNotFoundError: `path` looks like a local path and is not there, or a file of the checkpoint is missing.
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
    model.config._name_or_path = model.name_or_path = path
    model.__dict__.pop("_weight_conversions", None)  # else saving would undo how this folder happened to be read
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


def save_denoiser(
    model: Any,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    form: str = "rl4dlm",
) -> None:
    """Writes a model (or the adapter of a `PeftModel`) and its spec, and the tokenizer if given.

    Args:
        model: with a spec.
        path: of the folder; it appears under its name only when complete.
        tokenizer: saved beside the model.
        form: `"rl4dlm"`: a stock folder, from which `AutoModelForCausalLM.from_pretrained` gives bit-identical logits.
            `"hub"`: the tensors, dtypes and `config.json` of the published form. The family's own `.py` files are not
            written; whoever loads the folder with them copies them from the original repository.

    Raises:
        ValueError: a model without a spec; for `"hub"`, one without a family, an adapter or quantized weights.
        FileExistsError: `path` is a file, or a non-empty folder that does not hold a model.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not allowed; choose one of {', '.join(FORMS)}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not _lacks_mask_token(base.config):
        DiffusionSpec.of(base)
    if form == "hub":
        family = _family_of(model, base)
    with _replaced(Path(path)) as folder:
        if form == "hub":
            _write_published(family, base, folder)
        else:
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


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
    model = local_folder(_base_of(adapter)) if adapter.is_file() else folder
    hub = _read_config(model)
    given = {"mask_token_id": mask_token_id}
    family = find_family(hub) if hub.get("diffusion") is None else None
    stated = _own_spec(hub, given) if family is None else _published_spec(family, hub, model, given)
    spec = DiffusionSpec.from_dict(stated)
    own = adapter.is_file() and (folder / "tokenizer_config.json").is_file()
    tokenizer = tokens.load_tokenizer(folder if own else model, family, spec.mask_token_id)
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

    Raises FileNotFoundError for what looks like a local path and is not there. `options` are `snapshot_download`'s.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"there is no model folder {path!r}")
    return Path(snapshot_download(path, revision=revision, allow_patterns=list(_DOWNLOADED), **options))


def _read_config(folder: Path) -> HubConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder} holds no model")
    try:
        return HubConfig(json.loads(file.read_text(encoding="utf-8")), str(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


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
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.diffusion = spec
    if not _lacks_mask_token(config):
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
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False) if family.native else family.stock_config(hub)
    config.diffusion = spec
    text = config.get_text_config()
    record: dict[str, Any] = {"family": family.name, "config": dict(hub)}
    record["given"] = [
        family.block_key if name == "block_length" else name for name, value in given.items() if value is not None
    ]
    generation = folder / "generation_config.json"
    if generation.is_file():
        record["generation_config"] = json.loads(generation.read_text(encoding="utf-8"))
    setattr(config, RECORD, record)
    with Checkpoint(folder) as checkpoint:
        record["dtype"], record["dtypes"] = dtype_name(checkpoint.dtype), checkpoint.exceptions()
        if family.native:
            return _load_stock(family.model_class, folder, config, options)
        shapes, tied = _stock_shapes(family, config)
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
    model, report = loader.from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
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


def _lacks_mask_token(config: PreTrainedConfig) -> bool:
    """Whether it was loaded from files that state no mask token: it can be run and saved, and no more."""
    spec = getattr(config, "diffusion", None) or {}
    return "mask_token_id" in spec and spec["mask_token_id"] is None and spec.get("noise", "mask") == "mask"


def _readable(state: dict[str, LazyTensor]) -> dict[str, Any]:
    """Under ZeRO-3 transformers wants tensors, with values on the first process only; else they are read one by one."""
    if not is_deepspeed_zero3_enabled():
        return dict(state)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return {n: t[...] if first else torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}


def _stock_shapes(family: Family, config: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the stock model's tensors, and the names of those that are tied to others."""
    with torch.device("meta"):
        model = family.model_class(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(model._tied_weights_keys or ()) if config.get_text_config().tie_word_embeddings else set()
    return shapes, tied


def _load_adapter(folder: Path, adapter: Path, device: Any, options: dict[str, Any]) -> Any:
    from peft import PeftModel

    model = load_denoiser(_base_of(adapter), device=device, **options)
    return PeftModel.from_pretrained(model, os.fspath(folder), is_trainable=True)


def _base_of(adapter: Path) -> str:
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} names no base_model_name_or_path, so its base model is not known")
    return str(base)


# --- writing ----------------------------------------------------------------------------------------------------------


def _family_of(model: Any, base: Any) -> Family:
    """The family whose published form a model has. Raises ValueError where there is none or it cannot be written."""
    if model is not base:
        raise ValueError(
            "form='hub' writes whole models, and this is an adapter; merge it first: `model = model.merge_and_unload()`"
        )
    if getattr(base, "is_quantized", False):
        raise ValueError("form='hub' writes the published dtypes, and this model is quantized; load it unquantized")
    name = (getattr(base.config, RECORD, None) or {}).get("family")
    if name not in FAMILIES:
        raise ValueError(
            f"form='hub' needs to know the family, and `config.{RECORD}` names {name!r}; set it to {{'family': ...}} "
            f"with one of {', '.join(FAMILIES)}, or use form='rl4dlm'"
        )
    if any(hasattr(p, "ds_id") or p.is_meta or p.numel() == 0 for p in base.parameters()):
        raise ValueError("form='hub' needs all weights in one process; save the sharded model first and convert it")
    return FAMILIES[name]


def _write_published(family: Family, model: Any, folder: Path) -> None:
    record = getattr(model.config, RECORD)
    usual = getattr(torch, record.get("dtype") or dtype_name(model.dtype))
    unusual = {name: getattr(torch, other) for other, names in record.get("dtypes", {}).items() for name in names}
    if family.native:
        model.save_pretrained(folder, state_dict=_cast(model.state_dict(), usual, unusual))
        file = folder / "config.json"
        stock = json.loads(file.read_text(encoding="utf-8"))
        ours = {"diffusion", RECORD}
        _write_json(file, record.get("config") or {key: value for key, value in stock.items() if key not in ours})
    else:
        tensors = model.state_dict()
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        tied = _stock_shapes(family, model.config)[1]
        stored = record.get("tied_stored", ())
        layout: Layout = {
            name: parts
            for name, parts in family.tensors(shapes).items()
            if parts[0].tensor not in tied or name in stored
        }
        write_checkpoint(folder, layout, tensors, {name: unusual.get(name, usual) for name in layout})
        _write_json(folder / "config.json", family.hub_config(model.config))
    if record.get("generation_config") is not None:
        _write_json(folder / "generation_config.json", record["generation_config"])


def _cast(tensors: dict[str, torch.Tensor], usual: torch.dtype, unusual: dict[str, torch.dtype]) -> dict[str, Any]:
    """The tensors in other dtypes; what shared memory shares it again, so that it is written once."""
    found: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for name, tensor in tensors.items():
        found.setdefault((tensor.data_ptr(), unusual.get(name, usual)), tensor.to(unusual.get(name, usual)))
    return {name: found[tensor.data_ptr(), unusual.get(name, usual)] for name, tensor in tensors.items()}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when everything has been written."""
    is_model = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not is_model and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and holds no model; it will not be overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        for file in folder.iterdir():  # safetensors makes files that only their owner can read
            file.chmod(0o644)
        if target.exists():
            retired = folder.with_name(folder.name + ".old")
            os.replace(target, retired)
            os.replace(folder, target)
            shutil.rmtree(retired)
        else:
            os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
