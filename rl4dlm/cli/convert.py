"""`rl4dlm convert`: a checkpoint from one form into the other. The work is `rl4dlm.models.convert`'s."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rl4dlm.models.forms import FORMS


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
    from rl4dlm.models.convert import convert

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
