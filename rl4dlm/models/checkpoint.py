"""Weights of published checkpoints on disk: read tensor by tensor, checked before anything is computed, written back.

Owns safetensors files and the way between them and the tensors of a stock model. What the tensors are called is in the
families' layouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl4dlm.models.layout import Layout, Shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_METADATA = {"format": "pt"}
_SHOWN = 5  # names in an error


class Stored(NamedTuple):
    """Where a tensor is and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    handle: Any  # gives the values when sliced


@dataclass(frozen=True)
class Piece:
    """Rows of a published tensor, and the rows of a stock tensor (or of one of its experts) that they become."""

    source: Stored
    start: int
    stop: int
    expert: int | None
    target: int


@dataclass(frozen=True)
class LazyTensor:
    """A stock tensor that is read when it is sliced with `[...]`, the way transformers reads safetensors."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        first = self.pieces[0]
        if len(self.pieces) == 1 and first.expert is None and first.source.shape == self.shape:
            return first.source.handle[...][index]
        out = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            rows = slice(piece.target, piece.target + piece.stop - piece.start)
            into = out[rows] if piece.expert is None else out[piece.expert, rows]
            into.copy_(piece.source.handle[piece.start : piece.stop])
        return out[index]


class Checkpoint:
    """The tensors of a folder, by name. A context manager: the files are open while it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stated = stated_files(folder)
        self.tensors: dict[str, Stored] = {}
        self._files = ExitStack()
        for name in checked_files(folder, self.stated):
            pointer = self._files.enter_context(opened(folder / name))
            for key in pointer.keys():  # noqa: SIM118  (not a dictionary)
                part = pointer.get_slice(key)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"{folder / name}: {key} is {part.get_dtype()}, but weights must be one of "
                        f"{', '.join(_DTYPES)}; quantized checkpoints cannot be loaded, use the original one"
                    )
                self.tensors[key] = Stored(folder / name, tuple(part.get_shape()), dtype, part)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have."""
        sizes: dict[torch.dtype, int] = {}
        for stored in self.tensors.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def exceptions(self) -> dict[str, list[str]]:
        """Other dtypes, by name -> the tensors that have them."""
        others: dict[str, list[str]] = {}
        for name, stored in self.tensors.items():
            if stored.dtype != self.dtype:
                others.setdefault(dtype_name(stored.dtype), []).append(name)
        return others

    def check(self, layout: Layout, shapes: Shapes, stock: str, optional: Iterable[str] = ()) -> None:
        """Raises ValueError unless the folder holds exactly the tensors of a layout, in their shapes.

        Args:
            layout: the tensors that `config.json` asks for.
            shapes: of the stock model.
            stock: its class, for the message.
            optional: tensors that need not be there.
        """
        optional = set(optional)
        missing = [name for name in layout if name not in self.tensors and name not in optional]
        if missing:
            where = self.folder / self.stated.get(missing[0], INDEX if self.stated else SINGLE)
            raise ValueError(
                f"{where}: {listed(missing)} missing. config.json asks for {len(layout)} tensors; download the "
                "checkpoint again, or use the config.json that belongs to it"
            )
        extra = [name for name in self.tensors if name not in layout]
        if extra:
            raise ValueError(
                f"{self.tensors[extra[0]].file}: {listed(extra)} not in the model that config.json describes "
                f"({stock}), so the model would not be the one that was trained; use the config.json that belongs to "
                "these weights"
            )
        for name, stored in self.tensors.items():
            expected = _shape(layout, name, shapes)
            if stored.shape != expected:
                raise ValueError(
                    f"{stored.file}: {name} is {list(stored.shape)}, but config.json makes it {list(expected)}; use "
                    "the config.json that belongs to these weights"
                )

    def lazy(self, layout: Layout, shapes: Shapes) -> dict[str, LazyTensor]:
        """The stock tensors, none of them read yet."""
        pieces: dict[str, list[Piece]] = {}
        for name, parts in layout.items():
            if name not in self.tensors:
                continue
            row = 0
            for part in parts:
                length = part.stop - part.start
                piece = Piece(self.tensors[name], row, row + length, part.expert, part.start)
                pieces.setdefault(part.tensor, []).append(piece)
                row += length
        return {
            name: LazyTensor(tuple(found), tuple(shapes[name]), found[0].source.dtype) for name, found in pieces.items()
        }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError, naming the file, for anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also text in another encoding
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def stated_files(folder: Path) -> dict[str, str]:
    """Tensor -> file as the index of a folder says; empty without an index.

    Raises ValueError for an index that has no `weight_map`, or one that points out of the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    stated = read_json(index).get("weight_map")
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated.values()):
        raise ValueError(f"{index}: `weight_map` must say for each tensor in which file it is")
    for tensor, name in stated.items():
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{index}: `weight_map` says that {tensor} is in {name!r}, which is outside of the folder; a "
                "checkpoint reads its own files only"
            )
    return stated


def checked_files(folder: Path, stated: Mapping[str, str]) -> list[str]:
    """Names of the safetensors files of a folder. Raises FileNotFoundError, naming it, when one is missing."""
    files = sorted(set(stated.values())) or [SINGLE]
    for name in files:
        if (folder / name).is_file():
            continue
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if stated:
            remedy = f"({INDEX} names it); download the checkpoint again"
        elif pickles:
            remedy = (
                f"(weights are read from safetensors files only, and {pickles[0]} is a pickle, which can run code). "
                "Convert a file that you trust: `safetensors.torch.save_file(torch.load(file, weights_only=True), ...)`"
            )
        else:
            remedy = "(weights are read from safetensors files only); download the checkpoint again"
        raise FileNotFoundError(f"{folder / name} is missing {remedy}")
    return files


def opened(file: Path) -> Any:
    """A safetensors file to read from. Raises ValueError, naming it, for one that is damaged."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or was cut short ({error}); copy or download it again, {file.stat().st_size} bytes are "
            "there"
        ) from error


def unfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinite values; what is sharded, quantized or on no device passes."""
    bounds, names = [], []
    for name, tensor in tensors:
        value = tensor.detach()
        if value.dtype in _DTYPES.values() and value.numel() and not value.is_meta:
            low, high = value.aminmax()  # both are NaN where one element is
            bounds.append(torch.isfinite(low) & torch.isfinite(high))
            names.append(name)
    return [name for name, finite in zip(names, bounds, strict=True) if not bool(finite)]


def write_checkpoint(
    folder: Path,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Writes published tensors made from stock ones, a file of at most `SHARD_BYTES` at a time.

    Args:
        folder: exists.
        layout: what to write.
        tensors: of the stock model, by name.
        dtypes: of each published tensor.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sizes = {name: torch.Size(_shape(layout, name, shapes)).numel() * dtypes[name].itemsize for name in layout}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        save_file({name: _assemble(layout, name, tensors, dtypes[name]) for name in names}, folder / file, _METADATA)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def listed(names: list[str]) -> str:
    """The first names and how many more, as the beginning of a sentence."""
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _assemble(layout: Layout, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    parts = []
    for part in layout[name]:
        tensor = tensors[part.tensor].detach()
        tensor = tensor if part.expert is None else tensor[part.expert]
        parts.append(tensor[part.start : part.stop])
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined.to("cpu", dtype, copy=True).contiguous()


def _shape(layout: Layout, name: str, shapes: Shapes) -> tuple[int, ...]:
    parts = [part.shape(shapes) for part in layout[name]]
    return (sum(shape[0] for shape in parts), *parts[0][1:])
