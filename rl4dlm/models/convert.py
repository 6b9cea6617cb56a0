"""Converts a checkpoint from one form into the other, with its tokenizer.

Owns the command `rl4dlm convert` and which files travel along. Reading and writing models is `loading.py`'s, which is
imported when something is converted: the command line lists its commands without torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

FORMS = ("rl4dlm", "hub")
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
    from rl4dlm.models.loading import load_denoiser, load_tokenizer, local_folder, save_denoiser

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


def add_convert_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Convert a checkpoint between the published form of its family and the form that this library saves."
    command = commands.add_parser("convert", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=_run)
    command.add_argument("source", help="model folder or hub id, in either form")
    command.add_argument("target", help="folder to write")
    command.add_argument("--form", default="rl4dlm", choices=FORMS, help="form to write (default: %(default)s)")
    command.add_argument("--revision", help="of a hub id")
    command.add_argument("--mask-token-id", type=int, metavar="ID", help="where the checkpoint's files do not state it")
    command.add_argument("--block-length", type=int, metavar="N", help="likewise, of a block-diffusion checkpoint")


def _run(arguments: argparse.Namespace) -> int:
    convert(
        arguments.source,
        arguments.target,
        arguments.form,
        revision=arguments.revision,
        mask_token_id=arguments.mask_token_id,
        block_length=arguments.block_length,
    )
    sys.stdout.write(f"written to {arguments.target}\n")
    return 0
