"""Converts a checkpoint from one form into the other, and merges an adapter into its base, with the tokenizer.

Owns which files travel along. Reading and writing models is `loading.py`'s.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rl4dlm.models.forms import FORMS
from rl4dlm.models.loading import load_denoiser, load_tokenizer, local_folder, save_denoiser

_WRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    form: str = "rl4dlm",
    *,
    revision: str | None = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
) -> None:
    """Writes a checkpoint in another form; dtypes stay as they are.

    The whole model is in memory once. To `"rl4dlm"` the tokenizer goes with its mask token set; to `"hub"` all other
    files of the source (tokenizer, licence, the family's own code) go as they are.

    Args:
        source: a folder or hub id in either form.
        target: the new folder.
        form: `"rl4dlm"`, or `"hub"` for the published form of the model's family.
        revision: of a hub id.
        mask_token_id, block_length: for a checkpoint whose files do not state them.

    Raises:
        ValueError: as `load_denoiser` and `save_denoiser`, and when the target is the source.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not allowed; choose one of {', '.join(FORMS)}")
    folder = local_folder(source, revision)
    if Path(target).resolve() == folder.resolve():
        raise ValueError(f"target={os.fspath(target)!r} is the source; name another folder")
    model = load_denoiser(
        source, dtype="auto", revision=revision, mask_token_id=mask_token_id, block_length=block_length
    )
    tokenizer: Any = None
    if form == "rl4dlm" and any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        tokenizer = load_tokenizer(source, revision, mask_token_id=mask_token_id)
    save_denoiser(model, target, tokenizer, form=form)
    if form == "hub":
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in _WRITTEN:
                shutil.copyfile(file, Path(target) / file.name)


def merge(
    adapter: str | os.PathLike[str], target: str | os.PathLike[str], form: str = "rl4dlm", *, dtype: str = "auto"
) -> None:
    """Writes the whole model that an adapter and its base make, with the tokenizer.

    Args:
        adapter: a PEFT adapter folder; it names its base.
        target: the new folder.
        form: `"rl4dlm"`, or `"hub"` for the published form of the base's family, without the family's own code.
        dtype: in which base and adapter are added; `"auto"`: the base's own. Written as it is in our form.

    Raises:
        ValueError: `adapter` is no adapter, or the target is the adapter; else as `load_denoiser` and `save_denoiser`.
        FileNotFoundError: there is no such folder, or its base is not there.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not allowed; choose one of {', '.join(FORMS)}")
    folder = local_folder(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} has no adapter_config.json, so there is nothing to merge")
    if Path(target).resolve() == folder.resolve():
        raise ValueError(f"target={os.fspath(target)!r} is the adapter; name another folder")
    model = load_denoiser(adapter, dtype=dtype)
    base_name = model.get_base_model().name_or_path
    if Path(target).resolve() == Path(base_name).resolve():
        raise ValueError(f"target={os.fspath(target)!r} is the adapter's base; name another folder")
    tokenizer: Any = None
    places = (folder, local_folder(base_name))
    if any((place / name).is_file() for place in places for name in ("tokenizer_config.json", "tokenizer.json")):
        tokenizer = load_tokenizer(adapter)
    save_denoiser(model.merge_and_unload(), target, tokenizer, form=form)
