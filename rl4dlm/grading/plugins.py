"""Finds reward functions by name.

Owns the four ways to name one and the errors that say what exists. A reward function has TRL's signature,
`f(prompts, completions, **columns) -> list[float | None]`, where `None` means that a row cannot be scored.

| name | finds |
|---|---|
| `countdown`, `gsm8k:correctness` | a file of the rewards/ folder, and a function in it |
| `path/to/file.py`, `path/to/file.py:function` | the same for any file |
| `package.module:function` | something that can be imported |
| `name` of an entry point | what a distribution registers in the group `rl4dlm.rewards` |

A file named without a function means the function that has the file's name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rl4dlm import resources

ENTRY_POINT_GROUP = "rl4dlm.rewards"

RewardFunction = Callable[..., list[float | None]]


def load_reward(name: str) -> RewardFunction:
    """The reward function of this name; see the table above.

    Raises:
        TypeError: `name` is not a string.
        ValueError: nothing has this name (the error lists what exists), or what has it is no reward function.
        FileNotFoundError: the file of a `path/to/file.py` does not exist.
    """
    if not isinstance(name, str):
        raise TypeError(f"a reward is named by a string, got {type(name).__name__}")
    head, _, function = name.rpartition(":") if ":" in name else (name, "", "")
    if head.endswith(".py"):
        return _from_file(Path(head), function, name)
    plugin = _plugin_files().get(head)
    if plugin is not None:
        return _from_file(plugin, function, name)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.name == name:
            return _checked(entry_point.load(), name)
    if function and _importable(head):
        return _checked(_attribute(importlib.import_module(head), function, name), name)
    raise ValueError(
        f"unknown reward {name!r}; known rewards: {', '.join(available_rewards())}; or name one as "
        "path/to/file.py:function or module:function"
    )


def load_rewards(names: Iterable[str]) -> list[RewardFunction]:
    """`load_reward` for each name."""
    if isinstance(names, str):
        raise TypeError(f"rewards are a list of names, got the string {names!r}")
    return [load_reward(name) for name in names]


def available_rewards() -> list[str]:
    """What can be loaded by name alone: functions of the rewards/ folder, then entry points. Imports none."""
    found = []
    for stem, path in sorted(_plugin_files().items()):
        functions = _functions_defined_in(path)
        found += [stem] if stem in functions else []
        found += [f"{stem}:{function}" for function in functions if function != stem]
    return found + sorted(entry_point.name for entry_point in entry_points(group=ENTRY_POINT_GROUP))


def _plugin_files() -> dict[str, Path]:
    return {path.stem: path for path in resources.find("rewards").glob("*.py") if not path.stem.startswith("_")}


def _from_file(path: Path, function: str, name: str) -> RewardFunction:
    if not path.is_file():
        raise FileNotFoundError(f"reward {name!r}: there is no file {path}")
    return _checked(_attribute(_module_of(path), function or path.stem, name), name)


def _module_of(path: Path) -> ModuleType:
    path = path.resolve()
    # Two files of one name are two modules, and a plugin called math.py must not stand for the standard library's.
    module_name = f"rl4dlm_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _attribute(module: ModuleType, function: str, name: str) -> Any:
    if hasattr(module, function):
        return getattr(module, function)
    path = getattr(module, "__file__", None)
    defined = _functions_defined_in(Path(path)) if path and path.endswith(".py") else []
    raise ValueError(f"reward {name!r}: {path or module} has no function {function!r}; it defines {', '.join(defined)}")


def _checked(function: Any, name: str) -> RewardFunction:
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}, not a function")
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.name == "completions" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"{name!r} is no reward function: it takes no argument `completions`")
    return cast(RewardFunction, function)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _functions_defined_in(path: Path) -> list[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
