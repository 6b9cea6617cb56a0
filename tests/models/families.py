"""The families in small, and how tests take them apart: builders, inputs, folders with something wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl4dlm.models import tiny
from rl4dlm.models.loading import save_denoiser

BUILDERS: dict[str, Callable[..., Any]] = {
    "llada": tiny.tiny_llada,
    "illada": tiny.tiny_illada,
    "llada_moe": tiny.tiny_llada_moe,
    "llada2": tiny.tiny_llada2,
    "dream": tiny.tiny_dream,
    "sdar": tiny.tiny_sdar,
    "sdar_moe": tiny.tiny_sdar_moe,
    "fast_dllm": tiny.tiny_fast_dllm,
    "a2d_qwen3": tiny.tiny_a2d_qwen3,
    "a2d_qwen2": tiny.tiny_a2d_qwen2,
    "a2d_llama": tiny.tiny_a2d_llama,
    "nemotron_diffusion": tiny.tiny_nemotron_diffusion,
    "wedlm": tiny.tiny_wedlm,
    "diffusion_gemma": tiny.tiny_diffusion_gemma,
}
MASKED = [name for name in BUILDERS if name != "diffusion_gemma"]
MIXTURES = ["llada_moe", "llada2", "sdar_moe"]

IDS = torch.tensor([[5, 6, 2, 2, 9, 30, 2, 11], [7, 2, 8, 2, 2, 40, 41, 2]])


def build(name: str, **sizes: Any) -> Any:
    """A small model whose logits differ between tokens and experts."""
    return BUILDERS[name](**{"initializer_range": 0.3, **sizes})


def inputs(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """What a plain forward needs: DiffusionGemma denoises the second half after the first."""
    if model.config.diffusion["noise"] == "uniform":
        half = ids.shape[1] // 2
        return {"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]}
    return {"input_ids": ids}


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return model(**inputs(base, ids)).logits


def aligned(model: Any) -> Any:
    """The same weights in memory of their own: the sums of a matrix product depend on where a mapped file begins."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def hub_folder(name: str, folder: Path, **sizes: Any) -> Path:
    """A small checkpoint in the published form."""
    save_denoiser(build(name, **sizes), folder, form="hub")
    return folder


def edit(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Changes a JSON file of a folder; None removes a key."""
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        values.pop(key, None) if value is None else values.update({key: value})
    path.write_text(json.dumps(values))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that the safetensors files of a folder hold."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as pointer:
            found |= {name: pointer.get_tensor(name) for name in pointer.keys()}  # noqa: SIM118
    return found


def rewrite(folder: Path, values: dict[str, Tensor], files: int = 1) -> Path:
    """Replaces the weights of a folder, in one file or in several with an index."""
    for file in folder.glob("model*"):
        file.unlink()
    if files == 1:
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(sorted(values))}
    for file in set(where.values()):
        save_file({name: values[name] for name in values if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
