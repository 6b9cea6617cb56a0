"""What `rl4dlm eval`, `decode` and `filter` have in common: how to decode, on what device, which tasks, lists."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from rl4dlm.tasks import Task

DTYPES = ("auto", "float32", "bfloat16", "float16")
WIDE = 240
"""Columns of a table that is printed into a file."""

STOPS = {"yes": True, "no": False, "block": "block"}


def add_decoding_flags(
    add: Callable[..., Any], *, seed: int | None = 0, seed_help: str = "keys every draw (default: %(default)s)"
) -> None:
    """How to decode, and on what; with the default of the seed and what is said of it."""
    add("--schedule", default="low_confidence", help="decoding schedule (default: %(default)s)")
    add("--schedule-args", metavar="JSON", help="settings of the schedule")
    add("--canvas-length", type=int, default=256, metavar="N", help="completion slots (default: %(default)s)")
    add("--block-length", type=int, metavar="N", help="length of the blocks written left to right (default: one block)")
    add("--temperature", type=float, default=0.0, help="0 takes the most probable token (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="keep the most probable tokens that reach it (default: %(default)s)")
    add("--top-k", type=int, default=0, help="keep that many tokens; 0 is off (default: %(default)s)")
    add("--cfg-scale", type=float, default=0.0, help="classifier-free guidance; 0 is off (default: %(default)s)")
    add("--cache", default="auto", help="cache policy (default: %(default)s, an exact one where there is one)")
    add("--cache-args", metavar="JSON", help="settings of the cache policy")
    add("--draft-steps", type=int, default=0, metavar="N", help="guess so many steps ahead: the same in fewer forwards")
    add("--draft-width", type=int, default=1, metavar="N", help="guesses of each of them (default: %(default)s)")
    add("--stop-at-eos", default="yes", choices=STOPS, help="when rows stop early (default: %(default)s)")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end before that many tokens (default: none)")
    add("--eos-penalty", type=float, default=0.0, help="off the logits of end tokens (default: %(default)s)")
    add("--eos-penalty-decay", action="store_true", help="multiply it by the share of the canvas that is still open")
    add("--suppress-token-ids", metavar="LIST", help="tokens that are never drawn, with commas between them")
    add("--defer-token-ids", metavar="LIST", help="tokens that are written only when nothing else can be")
    add("--num-samples", type=count, default=1, metavar="N", help="completions per prompt (default: %(default)s)")
    add("--seed", type=int, default=seed, help=seed_help)
    add("--batch-rows", type=count, metavar="N", help="completions decoded at the same time (default: all)")
    add("--chat-template-kwargs", metavar="JSON", help="for the chat template, as the training configuration has them")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: %(default)s, as saved)")
    add("--device", help="for example cpu or cuda:1 (default: a GPU if there is one)")


def table_console() -> Console:
    """Where tables are printed: as wide as the terminal, and where there is none as wide as they are."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDE))


def count(text: str) -> int:
    """A number of things, 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not allowed; it must be 1 or larger")
    return value


def seconds(text: str) -> float:
    """A finite length of time, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it must be 0 or larger, and finite")
    return value


def decoding_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `eval` and `decode` have in common, all but the number of steps."""
    from rl4dlm.cli.arguments import mapping

    return {
        "canvas_length": arguments.canvas_length,
        "schedule": arguments.schedule,
        "block_length": arguments.block_length,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "cfg_scale": arguments.cfg_scale,
        "cache": arguments.cache,
        "cache_args": mapping("cache-args", arguments.cache_args),
        "draft_steps": arguments.draft_steps,
        "draft_width": arguments.draft_width,
        "stop_at_eos": STOPS[arguments.stop_at_eos],
        "min_new_tokens": arguments.min_new_tokens,
        "eos_penalty": arguments.eos_penalty,
        "eos_penalty_decay": arguments.eos_penalty_decay,
        "suppress_token_ids": ids_of("suppress-token-ids", arguments.suppress_token_ids),
        "defer_token_ids": ids_of("defer-token-ids", arguments.defer_token_ids),
        "schedule_args": mapping("schedule-args", arguments.schedule_args),
    }


def named_tasks(names: list[str], given: str | None) -> list[Task]:
    """The tasks of these names, with options given as JSON. Raises ValueError for options of a task not named."""
    from rl4dlm.cli.arguments import mapping
    from rl4dlm.tasks import load_task

    options = mapping("task-args", given)
    if len(names) == 1:
        return [load_task(names[0], **options)]
    unknown = sorted(set(options) - set(names))
    if unknown or not all(isinstance(value, dict) for value in options.values()):
        problem = f"names {unknown[0]!r}" if unknown else "holds something that is not a mapping"
        raise ValueError(f"task-args {problem}; with several tasks, give each one's options under its name")
    return [load_task(name, **options.get(name, {})) for name in names]


def device_of(name: str | None) -> Any:
    """The torch device of a name; None: a GPU if there is one. Raises ValueError for one that cannot be used."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device={name!r} cannot be used: {error}") from None
    return device


def listed(name: str, text: str) -> list[str]:
    """What stands between commas. Raises ValueError, with `name`, for nothing and for one thing twice."""
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise ValueError(f"{name}={text!r} names nothing")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={text!r} names one thing twice")
    return values


def ids_of(name: str, text: str | None) -> tuple[int, ...]:
    """Token ids between commas; None: none."""
    return () if text is None else tuple(numbers(name, text))


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers between commas. Raises ValueError, with `name`, for anything else."""
    try:
        return [int(value) for value in listed(name, text)]
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a list of whole numbers, such as 4,8,16") from None
