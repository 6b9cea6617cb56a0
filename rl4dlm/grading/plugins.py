"""Reward functions by name.

Owns what a reward function is, and which the library has. It has TRL's signature, `f(prompts, completions, **columns)
-> list[float | None]`, where `None` means that a row cannot be scored. How names are looked up is
`rl4dlm.plugins`'s: `countdown` and `gsm8k:correctness` are a file of the rewards/ folder and a function in it, next to
`path/to/file.py:function`, `package.module:function` and entry points of the group `rl4dlm.rewards`. A file named
without a function means the function that has the file's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from rl4dlm import plugins, resources

ENTRY_POINT_GROUP = "rl4dlm.rewards"

RewardFunction = Callable[..., list[float | None]]


def load_reward(name: str) -> RewardFunction:
    """The reward function of this name; see above.

    Raises:
        TypeError: `name` is not a string.
        ValueError: nothing has this name (the error lists what exists), or what has it is no reward function.
        FileNotFoundError: the file of a `path/to/file.py` does not exist.
    """
    kind = plugins.Kind(
        noun="reward",
        thing="function",
        entries=_entries,
        files=_plugin_files(),
        known=available_rewards,
        default=lambda module, path: path.stem,
    )
    return _checked(plugins.find(name, kind), name)


def load_rewards(names: Iterable[str]) -> list[RewardFunction]:
    """`load_reward` for each name."""
    if isinstance(names, str):
        raise TypeError(f"rewards are a list of names, got the string {names!r}")
    return [load_reward(name) for name in names]


def available_rewards() -> list[str]:
    """What can be loaded by name alone: functions of the rewards/ folder, then entry points. Imports none."""
    found = []
    for stem, path in sorted(_plugin_files().items()):
        functions = plugins.defined_in(path)
        found += [stem] if stem in functions else []
        found += [f"{stem}:{function}" for function in functions if function != stem]
    return found + sorted(entry_point.name for entry_point in _entries())


def _entries() -> Iterable[EntryPoint]:
    return entry_points(group=ENTRY_POINT_GROUP)


def _plugin_files() -> dict[str, Path]:
    return {path.stem: path for path in resources.find("rewards").glob("*.py") if not path.stem.startswith("_")}


def _checked(function: Any, name: str) -> RewardFunction:
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}, not a function")
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.name == "completions" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"{name!r} is no reward function: it takes no argument `completions`")
    return cast(RewardFunction, function)
