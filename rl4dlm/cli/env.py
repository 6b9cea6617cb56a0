"""`rl4dlm env`: versions, devices, optional packages and folders."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from typing import Any

from rl4dlm import resources

OPTIONAL = ("deepspeed", "bitsandbytes", "wandb", "tensorboard", "trackio", "matplotlib")


def add_env_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Print versions, devices, optional packages and folders."
    command = commands.add_parser("env", help=described, description=described)
    command.set_defaults(command=env)


def env(_: argparse.Namespace) -> int:
    """Prints versions, devices, optional packages and where the folders are that ship with rl4dlm."""
    from rl4dlm.evaluation import machine, versions

    found = machine()
    lines = {
        **versions(),
        "system": found["system"],
        "processor": f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB",
        "GPUs": ", ".join(found["gpus"]) or "none",
        **{name: _version(name) for name in OPTIONAL},
        **{f"{folder}/": str(resources.find(folder)) for folder in resources.FOLDERS},
    }
    for name, value in lines.items():
        sys.stdout.write(f"{name:<14} {value}\n")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (optional)"
