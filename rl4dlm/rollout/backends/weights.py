"""Weights on their way from a trainer to a server: a folder with one safetensors file for each version.

Owns what is written and what may be read. A version's folder appears under its name when it is complete, and what is in
it is checked against the model, whole, before anything of the model changes. Of a model with an adapter the adapter
alone travels, so that a server computes with base and adapter as the trainer does; both must have the same base, which
a fingerprint tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl4dlm.files import writing_folder
from rl4dlm.models.adapters import base_model

FILE = "weights.safetensors"
KEPT = 2
"""Versions of a run that stay in the folder."""

_KEY = "rl4dlm"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_SAMPLED = 16
"""Elements of a tensor that are in the fingerprint."""
_IGNORED = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version")
_LORA = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "fan_in_fan_out",
    "use_rslora", "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "init_lora_weights",
)  # fmt: skip
"""Settings of an adapter that a server takes over. Not `bias`, which trains biases of the base."""


def check_name(name: Any) -> str:
    """A version's name, which is that of a folder and no path. ValueError for anything else."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"version={str(name)[:80]!r} is not allowed; it has up to 128 letters, digits, '-' and '_', and starts "
            "with a letter or digit"
        )
    return name


def check_sendable(model: Any) -> None:
    """Raises ValueError for a policy whose weights a server could not compute with."""
    base = base_model(model)
    if getattr(base, "is_quantized", False):
        raise ValueError("rollouts of a quantized policy cannot come from a server; load it unquantized")
    if hasattr(model, "peft_config"):
        _adapter_of(model)


def send(model: Any, folder: str | os.PathLike[str], name: str) -> None:
    """Writes the weights of a policy as a version, and removes what is older than `KEPT` versions of the same run.

    Args:
        model: unwrapped, whole; its adapter alone if it has one.
        folder: shared with the server.
        name: of the version, RUN-...; what is before the first '-' is the run's.
    """
    if hasattr(model, "peft_config"):
        about: dict[str, Any] = {"kind": "adapter", "adapter": _adapter_of(model), "base": fingerprint(model)}
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        about, tensors = {"kind": "whole"}, dict(_once(model.state_dict()))
    kept = {key: value.detach().contiguous() for key, value in tensors.items()}
    with writing_folder(Path(folder) / check_name(name)) as new:
        save_file(kept, new / FILE, {_KEY: json.dumps(about)})
    remove_older(folder, name.partition("-")[0])


def remove_older(folder: str | os.PathLike[str], run: str) -> None:
    """Removes all but the newest versions of a run, whose names begin with its name and '-'."""
    own = [path for path in Path(folder).iterdir() if path.name.partition("-")[0] == run and path.is_dir()]
    for path in sorted(own, key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


class Receiver:
    """The weights of a server's model, as they come.

    Args:
        model: a denoiser without an adapter. folder: that versions are read from, and nothing else is.
    """

    def __init__(self, model: Any, folder: str | os.PathLike[str]) -> None:
        self.model, self.folder = model, Path(folder).resolve()
        self.name: str | None = None
        """Of the version that the model has; None: those that it was loaded with."""
        self._adapted: Any = None
        self._adapter: dict[str, Any] | None = None

    def receive(self, name: str) -> None:
        """Loads a version. ValueError, and a model as it was, if there is none or it is another model's."""
        path = (self.folder / check_name(name) / FILE).resolve()
        if not path.is_relative_to(self.folder):  # a link
            raise ValueError(f"version={name!r} is not allowed: it leads out of the folder")
        if not path.is_file():
            raise ValueError(f"version={name!r} is not in the folder that this server reads weights from")
        try:
            with safe_open(path, "pt") as file:  # tensors are read when they are needed
                about, names = json.loads(file.metadata()[_KEY]), list(file.keys())
                tensors = {key: file.get_tensor(key) for key in names}
                kind = about.get("kind")
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"version={name!r} holds no weights as a trainer of rl4dlm writes them") from None
        if kind == "adapter":
            self._receive_adapter(about, tensors)
        elif kind != "whole":
            raise ValueError(f"version={name!r} holds kind={str(kind)[:80]!r}; allowed: whole, adapter")
        elif self._adapted is not None:
            raise ValueError("the weights are a whole model's, and this server has an adapter by now; start it again")
        else:
            self._copy(dict(self.model.state_dict()), tensors)
        self.name = name

    def _receive_adapter(self, about: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        if about.get("base") != fingerprint(self.model):
            raise ValueError("the adapter is one of other weights than those this server was started with")
        adapter = about.get("adapter")
        if self._adapted is None:
            self._adapted, self._adapter = get_peft_model(self.model, _config(adapter)).eval(), adapter
        elif adapter != self._adapter:
            raise ValueError("the adapter has other settings than the one before; start the server again")
        own = get_peft_model_state_dict(self._adapted, save_embedding_layers=False)
        self._check(own, tensors)
        set_peft_model_state_dict(self._adapted, tensors)

    def _copy(self, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        names = {value.data_ptr(): name for name, value in _once(own)}
        groups = {name: names[value.data_ptr()] for name, value in own.items() if value.numel()}
        found = {groups.get(name, name): value for name, value in tensors.items()}  # tied ones came under one name
        self._check(dict(_once(own)), found)
        with torch.no_grad():
            for name, value in found.items():
                own[name].copy_(value)

    def _check(self, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        if missing or unknown:
            raise ValueError(f"the weights are another model's: {missing[:3]} are missing, {unknown[:3]} not known")
        for name, value in tensors.items():
            if value.shape != own[name].shape:
                raise ValueError(f"{name} has shape {list(value.shape)}; this model's has {list(own[name].shape)}")
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{name} is not finite")


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """A hash of names, shapes and some values of a model without its adapter, in bfloat16: the same for weights that
    were loaded in another dtype."""
    base = base_model(model)
    digest = hashlib.sha256()
    named = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in base.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    for name, value in sorted(named.items()):  # in the order of a model without an adapter
        flat = value.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat)), dtype=torch.float64).long()
        some = flat[places.to(flat.device)].to(torch.bfloat16).view(torch.int16).tolist()
        digest.update(json.dumps([name, list(value.shape), some]).encode())
    return digest.hexdigest()


def _once(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and of those that are tied the first."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.numel() and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        yield name, value


def _adapter_of(model: Any) -> dict[str, Any]:
    """The settings of a policy's adapter. ValueError for one that cannot travel."""
    if list(model.peft_config) != ["default"] or getattr(model.peft_config["default"], "peft_type", None) != "LORA":
        raise ValueError(
            f"rollouts of a policy with adapters {list(model.peft_config)} of type "
            f"{[str(config.peft_type) for config in model.peft_config.values()]} cannot come from a server; allowed: "
            "one LoRA adapter"
        )
    config, plain = model.peft_config["default"], {}
    for entry in fields(LoraConfig):
        value = getattr(config, entry.name, None)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if value == default or entry.name in ("peft_type", *_IGNORED):
            continue
        if entry.name not in _LORA:
            raise ValueError(f"rollouts of a LoRA adapter with {entry.name}={value!r} cannot come from a server")
        plain[entry.name] = sorted(value) if isinstance(value, set) else value
    plain.pop("init_lora_weights", None)  # how it began says nothing about how it is
    return plain


def _config(adapter: Any) -> LoraConfig:
    if not isinstance(adapter, dict) or set(adapter) - set(_LORA):
        raise ValueError(f"the adapter has settings that a server does not take; allowed: {', '.join(_LORA)}")
    try:
        return LoraConfig(**adapter)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapter's settings are not allowed: {error}") from None
