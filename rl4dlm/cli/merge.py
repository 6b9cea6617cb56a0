"""`rl4dlm merge`: an adapter and its base into one model. The work is `rl4dlm.models.convert`'s."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rl4dlm.models.forms import FORMS

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_merge_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Merge a LoRA adapter into the model that it was trained on, and write the result."
    command = commands.add_parser("merge", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=_run)
    command.add_argument("adapter", help="adapter folder; it names its base")
    command.add_argument("target", help="folder to write")
    command.add_argument("--form", default="rl4dlm", choices=FORMS, help="form to write (default: %(default)s)")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: the base's)")


def _run(arguments: argparse.Namespace) -> int:
    from rl4dlm.models.convert import merge

    merge(arguments.adapter, arguments.target, arguments.form, dtype=arguments.dtype)
    sys.stdout.write(f"written to {arguments.target}\n")
    return 0
