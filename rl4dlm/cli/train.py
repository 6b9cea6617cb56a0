"""`rl4dlm train`: a script of trainers/, started by `accelerate launch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rl4dlm import resources

LAUNCHER_ONLY = (
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--gpu_ids",
)


def add_train_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`, for its help: the trainer's own flags are not known to it."""
    described = "Start a trainer: `accelerate launch` with a script of trainers/."
    command = commands.add_parser(
        "train",
        help=described,
        description=described,
        usage="rl4dlm train NAME [trainer flags]\n       rl4dlm train NAME [accelerate options] -- [trainer flags]",
        epilog=f"Trainers: {', '.join(sorted(path.stem for path in resources.find('trainers').glob('*.py')))}. "
        "`accelerate launch --help` lists the options of accelerate, `rl4dlm train NAME --help` the trainer's flags.",
    )
    command.set_defaults(command=lambda _: 0)


def train(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by `accelerate launch` with a script of trainers/.

    Args:
        arguments: a trainer's name, then `[accelerate options] -- [trainer flags]`, or trainer flags alone.

    Raises:
        ValueError: an unknown trainer, or an option of accelerate where the trainer's flags are.
    """
    sys.stdout.flush()
    os.execv(sys.executable, launch_command(arguments))


def launch_command(arguments: Sequence[str]) -> list[str]:
    """The command that `train` becomes."""
    folder = resources.find("trainers")
    names = sorted(path.stem for path in folder.glob("*.py"))
    name, *rest = arguments or [""]
    if name not in names:
        given = f"trainer {name!r} is unknown" if name else "train needs the name of a trainer"
        raise ValueError(f"{given}; choose one of {', '.join(names)}")
    launcher, flags = [], rest
    if "--" in rest:
        split = rest.index("--")
        launcher, flags = rest[:split], rest[split + 1 :]
    misplaced = [flag for flag in flags if flag.partition("=")[0] in LAUNCHER_ONLY]
    if misplaced:
        raise ValueError(
            f"{misplaced[0]} belongs to accelerate; its options go before a `--`, the trainer's behind it: "
            f"rl4dlm train {name} {misplaced[0]} ... -- --config ..."
        )
    launcher, flags = _shipped(launcher, "--config_file"), _shipped(flags, "--config")
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(folder / f"{name}.py"), *flags]


def _shipped(arguments: Sequence[str], flag: str) -> list[str]:
    """Lets a configuration that ships with rl4dlm be named as in a checkout, `configs/...`, from any folder."""
    found = list(arguments)
    for i, argument in enumerate(found):
        if i and found[i - 1] == flag and not Path(argument).exists():
            shipped = resources.find("configs").parent / argument
            if argument.startswith("configs/") and shipped.is_file():
                found[i] = str(shipped)
    return found
