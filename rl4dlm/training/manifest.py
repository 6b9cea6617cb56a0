"""What a checkpoint folder holds, whether all of it is there and whole, and which folder of a run to go on from.

Owns the manifest, the rules for folders without one (of older versions), and the choice of a folder. When checkpoints
are written is `checkpoints.py`'s. A large file is checked at its ends and at places spread over it, not byte by byte.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rl4dlm.files import write_text

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_LATEST, _NONE = ("true", "latest"), ("", "false", "none")
_ARCHIVES = (".pt", ".pth", ".bin")  # torch's zip files, which carry checksums of their own
_BLOCK, _WHOLE = 2**20, 2**28  # bytes of a block, and of the largest file whose checksum is over all of it


class CheckpointError(ValueError):
    """A checkpoint that training cannot go on from; the message names the file and what is wrong with it."""


def write_manifest(folder: str | os.PathLike[str], *, global_step: int, world_size: int) -> None:
    """Lists a finished folder's files; the manifest is the last file of a checkpoint to be written."""
    root = Path(folder)
    files = {}
    for path in _files(root):
        entry: dict[str, int] = {"size": path.stat().st_size}
        if path.suffix == ".safetensors":
            entry["checksum"] = checksum(path)
        files[path.relative_to(root).as_posix()] = entry
    content = {"format": 1, "global_step": global_step, "world_size": world_size, "files": files}
    write_text(root / MANIFEST, json.dumps(content, indent=1) + "\n")


def checksum(path: Path) -> int:
    """CRC-32 of a file; of a large one that of its first and last blocks and of 62 between them."""
    size = path.stat().st_size
    blocks = range(0, size, _BLOCK)
    if size > _WHOLE:
        blocks = [round(i * (size - _BLOCK) / 63) for i in range(64)]  # type: ignore[assignment]
    value = 0
    with path.open("rb") as file:
        for start in blocks:
            file.seek(start)
            value = zlib.crc32(file.read(_BLOCK), value)
    return value


def check_checkpoint(folder: str | os.PathLike[str], *, cycles: bool = False, thorough: bool = True) -> None:
    """Raises `CheckpointError`, which names the file, where something in a checkpoint is missing or damaged.

    Args:
        folder: the checkpoint.
        cycles: whether each process must have left its generation cycle there, as those of RL trainers do.
        thorough: whether files are read; else they must be there, with their sizes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: there is no such checkpoint folder")
    listed = _listed(root)
    for name, entry in listed.items():
        path = root / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, which the checkpoint's manifest lists")
        # What checks itself may be edited by hand, as long as it can be read.
        if path.suffix not in (*_ARCHIVES, ".json") and path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes, and {entry['size']} were written")
    _check_parts(root, cycles)
    for path in _files(root):
        if path.stat().st_size == 0 and listed.get(path.relative_to(root).as_posix(), {}).get("size") != 0:
            raise CheckpointError(f"{path} is damaged: it is empty")
    if not thorough:
        return
    for path in _files(root):
        expected = listed.get(path.relative_to(root).as_posix(), {}).get("checksum")
        problem = _damage(path)
        if problem is None and expected is not None and checksum(path) != expected:
            problem = "its checksum is not that of what was written"
        if problem is not None:
            raise CheckpointError(f"{path} is damaged: {problem}")


def folder_to_resume(
    wanted: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str], *, cycles: bool = False
) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means; None: training starts anew.

    Args:
        wanted: a folder, which must be complete; True, `"true"` or `"latest"`: the newest complete one of the run, if
            any; what is skipped is logged, with the reason. None, False or `"false"`: none.
        output_dir: the run's folder.
        cycles: as for `check_checkpoint`.

    Raises:
        CheckpointError: the folder named is not complete.
    """
    word = str(wanted).strip().lower()
    if wanted is None or wanted is False or word in _NONE:
        return None
    if word not in _LATEST:
        folder = os.fspath(wanted)  # type: ignore[arg-type]
        check_checkpoint(folder, cycles=cycles)
        return folder
    for path in checkpoints(output_dir):
        try:
            check_checkpoint(path, cycles=cycles)
        except CheckpointError as error:
            logger.warning("%s is skipped: %s", path, error)
            continue
        logger.warning("training goes on from %s", path)
        return str(path)
    logger.warning("%s has no complete checkpoint; training starts anew", output_dir)
    return None


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    root = Path(output_dir)
    found = [path for path in root.glob("checkpoint-*") if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The global step in a checkpoint folder's name."""
    match = _FOLDER.fullmatch(folder.name)
    return -1 if match is None else int(match[1])


def _listed(root: Path) -> dict[str, dict[str, int]]:
    path = root / MANIFEST
    if not path.is_file():
        return {}
    try:
        files: dict[str, dict[str, int]] = json.loads(path.read_text())["files"]
        if not all(isinstance(entry["size"], int) for entry in files.values()):
            raise TypeError("a size is no number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    return files


def _files(root: Path) -> Iterator[Path]:
    # What starts with a dot is a file being written.
    yield from (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != MANIFEST and p.name[0] != ".")


def _check_parts(root: Path, cycles: bool) -> None:
    """That a model, an optimizer, a scheduler, random states and the trainer's state are there, in whatever form."""

    def need(name: str) -> None:
        if not (root / name).is_file():
            raise CheckpointError(f"{root / name} is missing; training cannot go on exactly without it")

    need("trainer_state.json")
    sharded = (
        any(path.is_dir() for path in root.glob("pytorch_model_fsdp*")) or (root / "pytorch_model_fsdp.bin").exists()
    )
    deepspeed = (root / "latest").is_file() or any(root.glob("global_step*"))
    if deepspeed:
        need("latest")
        tag = (root / "latest").read_text().strip()
        states = root / tag
        if not tag or not any(states.glob("*model_states.pt")):
            raise CheckpointError(f"{states}/*model_states.pt are missing; training cannot go on exactly without them")
        if not any(states.glob("*optim_states.pt")):
            raise CheckpointError(f"{states}/*optim_states.pt are missing; training cannot go on exactly without them")
    elif not sharded:
        _check_weights(root)
        if not (root / "optimizer.bin").is_file():
            need("optimizer.pt")
    if not deepspeed:
        need("scheduler.pt")
    many = sorted(int(p.stem.rpartition("_")[2]) for p in root.glob("rng_state_*.pth"))
    world = max(_world_size(root), many[-1] + 1 if many else 1)
    for rank in range(world):
        need(f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth")
        if cycles:
            need(f"generation_cycle_{rank}.pt")


def _world_size(root: Path) -> int:
    path = root / MANIFEST
    return int(json.loads(path.read_text()).get("world_size", 1)) if path.is_file() else 1


def _check_weights(root: Path) -> None:
    whole = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
    if any((root / name).is_file() for name in whole):
        return
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = root / name
        if not path.is_file():
            continue
        try:
            shards = set(json.loads(path.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from None
        for shard in sorted(shards):
            if not (root / shard).is_file():
                raise CheckpointError(f"{root / shard} is missing, which {name} lists")
        return
    if not any(root.glob("*/adapter_model.*")):
        raise CheckpointError(f"{root / whole[0]} is missing: there are no weights of a model or an adapter")


def _damage(path: Path) -> str | None:
    """What is wrong with a file, as far as its own form tells."""
    reader = {".json": _json, ".safetensors": _safetensors, **dict.fromkeys(_ARCHIVES, _archive)}.get(path.suffix)
    if reader is None:
        return None
    readable: Callable[[Path], Any] = reader
    try:
        readable(path)
    except (ValueError, OSError, KeyError, TypeError, zipfile.BadZipFile, struct.error) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        small = path.stat().st_size <= _WHOLE
        bad = archive.testzip() if small else None
    if bad is not None:
        raise ValueError(f"its part {bad} does not have the checksum that was written")


def _safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, and its header speaks of {8 + length + end}")
