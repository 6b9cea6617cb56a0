"""`rl4dlm train`: a script of trainers/, by itself for one process, else started by `accelerate launch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

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
    """Replaces this process by a script of trainers/, or for several processes by `accelerate launch` with it.

    Args:
        arguments: a trainer's name, then `[accelerate options] -- [trainer flags]`, or trainer flags alone.

    Raises:
        ValueError: an unknown trainer, or an option of accelerate where the trainer's flags are.
    """
    sys.stdout.flush()
    os.execv(sys.executable, launch_command(arguments))


def launch_command(arguments: Sequence[str]) -> list[str]:
    """The command that `train` becomes: for one process the script itself, so that signals reach the trainer."""
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
    script = [str(folder / f"{name}.py"), *flags]
    if _is_one_process(launcher):
        return [sys.executable, *script]
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, *script]


def _is_one_process(launcher: list[str]) -> bool:
    """Whether options of accelerate ask for one process and nothing else; without any, whether there is one device."""
    if launcher in (["--num_processes", "1"], ["--num_processes=1"]):
        return True
    if len(launcher) == 2 and launcher[0] == "--config_file":
        return _asks_for_one_process(Path(launcher[1]))
    if launcher:
        return False
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "accelerate"
    for default in ("default_config.yaml", "default_config.yml", "default_config.json"):
        if (cache / default).is_file():
            return _asks_for_one_process(cache / default)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return "," not in visible
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) <= 1  # without importing torch


def _asks_for_one_process(config: Path) -> bool:
    """Whether a configuration of accelerate says nothing but "one process"."""
    try:
        found = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError):
        return False  # accelerate says what is wrong with it
    if not isinstance(found, dict) or found.get("num_processes") != 1:
        return False
    idle = {
        "num_processes": (1,),
        "compute_environment": ("LOCAL_MACHINE",),
        "distributed_type": ("NO", False),
        "num_machines": (1,),
        "machine_rank": (0,),
        "mixed_precision": ("no", False),
        "main_training_function": ("main",),
        "rdzv_backend": ("static",),
    }
    return all(value in idle.get(name, (False, None)) for name, value in found.items())


def _shipped(arguments: Sequence[str], flag: str) -> list[str]:
    """Lets a configuration that ships with rl4dlm be named as in a checkout, `configs/...`, from any folder."""
    found = list(arguments)
    for i, argument in enumerate(found):
        if i and found[i - 1] == flag and not Path(argument).exists():
            shipped = resources.find("configs").parent / argument
            if argument.startswith("configs/") and shipped.is_file():
                found[i] = str(shipped)
    return found
