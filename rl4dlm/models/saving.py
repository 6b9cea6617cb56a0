"""Writes denoisers: in our form, in the published form of their family, and the adapters of PEFT models.

Owns what a written folder holds. Which tensors a published form consists of is `families/`'s, files are
`checkpoint.py`'s, reading is `loading.py`'s.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rl4dlm.files import writing_folder
from rl4dlm.models.adapters import base_model
from rl4dlm.models.checkpoint import dtype_name, listed, read_json, write_checkpoint
from rl4dlm.models.families import FAMILIES
from rl4dlm.models.family import RECORD, Family
from rl4dlm.models.forms import FORMS
from rl4dlm.models.layout import Layout
from rl4dlm.models.spec import DiffusionSpec, lacks_mask_token
from rl4dlm.models.unmasking import write_policy

log = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def save_denoiser(
    model: Any,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    form: str = "rl4dlm",
    dtype: str | torch.dtype | None = None,
) -> None:
    """Writes a model (or the adapter of a `PeftModel`) and its spec, its unmasking policy, and the tokenizer if given.

    Args:
        model: with a spec.
        path: of the folder; it appears under its name only when complete and on the disk.
        tokenizer: saved beside the model.
        form: `"rl4dlm"`: a stock folder, from which `AutoModelForCausalLM.from_pretrained` gives bit-identical logits.
            `"hub"`: the tensors, dtypes and `config.json` of the published form. The family's own `.py` files are not
            written; whoever loads the folder with them copies them from the original repository.
        dtype: for `"hub"`, that of all weights; None: the published ones. A warning says when weights are rounded.

    Raises:
        ValueError: a model without a spec; for `"hub"`, one without a family, an adapter or quantized weights; a dtype
            that is none, or given with another form.
        FileExistsError: `path` is a file, or a non-empty folder that does not hold a model.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not allowed; choose one of {', '.join(FORMS)}")
    chosen = None if dtype is None else dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if chosen is not None and (chosen not in _DTYPES or form != "hub"):
        raise ValueError(
            f"dtype={dtype!r} is not allowed with form={form!r}; it is for form='hub' and one of {', '.join(_DTYPES)}"
        )
    base = base_model(model)
    if not lacks_mask_token(base.config):
        DiffusionSpec.of(base)
    if form == "hub":
        family = _family_of(model, base)
    target = Path(path)
    is_model = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not is_model and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and holds no model; it will not be overwritten")
    with writing_folder(target) as folder:
        if form == "hub":
            _write_published(family, base, folder, chosen)
        else:
            model.save_pretrained(folder)
            _name_base(folder)
        write_policy(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            _forget_remote_code(folder)


def _name_base(folder: Path) -> None:
    """Lets an adapter name its base in a way that does not depend on the folder in which it is loaded."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    settings = read_json(file)
    base = settings.get("base_model_name_or_path")
    if base and os.path.isdir(base) and not os.path.isabs(base):
        _write_json(file, {**settings, "base_model_name_or_path": os.path.abspath(base)})


def _forget_remote_code(folder: Path) -> None:
    """The files that are written are those of a stock tokenizer, whatever class the original named beside them."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    if settings.pop("auto_map", None) is not None:
        _write_json(file, settings)


def _family_of(model: Any, base: Any) -> Family:
    """The family whose published form a model has. Raises ValueError where there is none or it cannot be written."""
    if model is not base:
        raise ValueError(
            "form='hub' writes whole models, and this is an adapter; merge it first: "
            "`model = model.merge_and_unload()`, or `rl4dlm merge`"
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


def _write_published(family: Family, model: Any, folder: Path, chosen: str | None) -> None:
    record = getattr(model.config, RECORD)
    usual = getattr(torch, chosen or record.get("dtype") or dtype_name(model.dtype))
    exceptions = {} if chosen else record.get("dtypes", {})
    unusual = {name: getattr(torch, other) for other, names in exceptions.items() for name in names}
    tensors = model.state_dict()
    if family.native:
        _warn_of_rounding(tensors, {name: unusual.get(name, usual) for name in tensors})
        model.save_pretrained(folder, state_dict=_cast(tensors, usual, unusual))
        stock = read_json(folder / "config.json")
        ours = {"diffusion", RECORD}
        config = record.get("config") or {key: value for key, value in stock.items() if key not in ours}
    else:
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        tied = family.stock_shapes(model.config)[1]
        stored = record.get("tied_stored", ())
        layout: Layout = {
            name: parts
            for name, parts in family.tensors(shapes).items()
            if parts[0].tensor not in tied or name in stored
        }
        dtypes = {name: unusual.get(name, usual) for name in layout}
        _warn_of_rounding(tensors, {part.tensor: dtypes[name] for name, parts in layout.items() for part in parts})
        write_checkpoint(folder, layout, tensors, dtypes)
        config = family.hub_config(model.config)
    if chosen is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = {**config, key: chosen}
    _write_json(folder / "config.json", config)
    if record.get("generation_config") is not None:
        _write_json(folder / "generation_config.json", record["generation_config"])


def _warn_of_rounding(tensors: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]) -> None:
    """Says so when weights change by being written, as those do that were trained in a wider dtype."""
    rounded = []
    for name, dtype in dtypes.items():
        value = tensors[name].detach()
        if torch.promote_types(value.dtype, dtype) != dtype and not torch.equal(value.to(dtype).to(value.dtype), value):
            rounded.append(name)
    if rounded:
        to = ", ".join(sorted({dtype_name(dtypes[name]) for name in rounded}))
        log.warning(
            "form='hub' rounds %d of %d tensors from %s to the %s of the published form, which moves the logits: %s "
            "changed. Pass dtype='float32' to save_denoiser to keep them, or use form='rl4dlm'",
            len(rounded),
            len(dtypes),
            dtype_name(tensors[rounded[0]].dtype),
            to,
            listed(rounded),
        )


def _cast(tensors: dict[str, torch.Tensor], usual: torch.dtype, unusual: dict[str, torch.dtype]) -> dict[str, Any]:
    """The tensors in other dtypes; what shared memory shares it again, so that it is written once."""
    found: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for name, tensor in tensors.items():
        found.setdefault((tensor.data_ptr(), unusual.get(name, usual)), tensor.to(unusual.get(name, usual)))
    return {name: found[tensor.data_ptr(), unusual.get(name, usual)] for name, tensor in tensors.items()}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
