"""Rows from files and from the hub.

Owns the file formats and which file belongs to which split. What the columns mean is each task's business.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

FORMATS = (".csv", ".json", ".jsonl", ".parquet")

Paths = str | Path | Mapping[str, str | Path] | None


def files_by_split(path: Paths, splits: tuple[str, ...]) -> dict[str, Path]:
    """Which file to read for which split. A path alone is the file of the test split.

    Raises:
        ValueError: a split that the task does not have, or a format that cannot be read.
        FileNotFoundError: a file that does not exist.
    """
    if path is None:
        return {}
    files = {split: Path(file) for split, file in (path if isinstance(path, Mapping) else {"test": path}).items()}
    for split, file in files.items():
        if split not in splits:
            raise ValueError(f"path names a file for the split {split!r}; the task's splits: {', '.join(splits)}")
        if file.suffix not in FORMATS:
            raise ValueError(f"path={str(file)!r}; files that can be read end in {', '.join(FORMATS)}")
        if not file.is_file():
            raise FileNotFoundError(f"path={str(file)!r}: there is no such file")
    return files


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """The rows of a file, in order. CSV values stay strings, so that leading zeros survive.

    Args:
        columns: names that every row must have.

    Raises:
        ValueError: the file is malformed, empty, or a row lacks a column.
    """
    try:
        rows = _READERS[path.suffix](path)
    except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise ValueError(
                f"{path}: row {number} has no {', '.join(missing)}; its columns: {', '.join(map(str, row))}"
            )
    return rows


def read_hub(hub_id: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a dataset on the Hugging Face hub; of all its configurations where `config` is `None`."""
    from datasets import get_dataset_config_names, load_dataset

    configs = [config] if config else get_dataset_config_names(hub_id)
    return [row for name in configs for row in load_dataset(hub_id, name, split=split)]


def check_held_out(size: Any) -> None:
    """Raises ValueError for a `validation_size` that is no whole number from 0 on."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"validation_size={size!r} is not allowed; it must be a whole number, 0 (none) or larger")


def with_validation(
    task: str, read: Callable[[str], list[dict[str, Any]]], split: str, files: Collection[str], size: int
) -> list[dict[str, Any]]:
    """The rows of a split, where the validation split is the end of the training split unless it has a file.

    Raises ValueError where the validation split is neither, or the training split has not so many rows.
    """
    if split == "test" or "validation" in files or (split == "train" and not size):
        return read(split)
    if not size:
        raise ValueError(
            f"task {task!r} has no split 'validation' of its own; set validation_size to hold out rows of its training "
            "split, name a file for it in path, or evaluate on another split"
        )
    rows = read("train")
    if len(rows) <= size:
        raise ValueError(f"validation_size={size} leaves nothing of the {len(rows)} rows of the training split")
    return rows[-size:] if split == "validation" else rows[:-size]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _read_json(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of objects")
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has a line that is not an object")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from datasets import Dataset

    return list(Dataset.from_parquet(str(path), keep_in_memory=True))


_READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
