"""Finds what people plug in by name: reward functions, tasks.

Owns the ways to name a thing and the errors that say what exists. Whether a thing is what it should be is its kind's
business (`rl4dlm.grading.plugins`, `rl4dlm.tasks`).

| name | finds |
|---|---|
| `countdown` | what the library has under that name |
| `path/to/file.py:thing`, or `path/to/file.py` | something a file defines; without a name, what the kind says |
| `name` of an entry point | what an installed distribution registers in the kind's group |
| `package.module:thing` | something that can be imported |
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What is looked for.

    Args:
        noun: in messages, such as `"reward"`.
        thing: what a file defines, such as `"function"`.
        entries: the entry points of the kind's group.
        files: plugin files of the library by name; a name that is one of them may have `:thing` behind it.
        known: the names that the library has, for messages.
        default: from a module to the name of what it stands for, where the file is named alone.
    """

    noun: str
    thing: str
    entries: Callable[[], Iterable[EntryPoint]]
    files: Mapping[str, Path]
    known: Callable[[], Iterable[str]]
    default: Callable[[ModuleType, Path], str]


def find(name: str, kind: Kind) -> Any:
    """The object of this name; see the table above.

    Raises:
        TypeError: `name` is not a string.
        ValueError: nothing has this name; the error lists what exists, and what is spelt like it.
        FileNotFoundError: the file of a `path/to/file.py` does not exist.
    """
    if not isinstance(name, str):
        raise TypeError(f"a {kind.noun} is named by a string, got {type(name).__name__}")
    head, _, thing = name.rpartition(":") if ":" in name else (name, "", "")
    if head.endswith(".py"):
        return _from_file(Path(head).expanduser(), thing, name, kind)
    if head in kind.files:
        return _from_file(kind.files[head], thing, name, kind)
    for entry_point in kind.entries():
        if entry_point.name == name:
            return entry_point.load()
    if thing and _importable(head):
        return _attribute(importlib.import_module(head), thing, name, kind)
    known = list(kind.known())
    raise ValueError(
        f"unknown {kind.noun} {name!r}; known {kind.noun}s: {', '.join(known)}{did_you_mean(name, known)}; or name one "
        f"as path/to/file.py:{kind.thing} or module:{kind.thing}"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'countdown'?)"`, or nothing where no name is spelt like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def defined_in(path: Path, node: type[ast.FunctionDef] | type[ast.ClassDef] = ast.FunctionDef) -> list[str]:
    """Names of the public functions, or classes, at the top of a file. Does not run it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [part.name for part in body if isinstance(part, node) and not part.name.startswith("_")]


def _from_file(path: Path, thing: str, name: str, kind: Kind) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{kind.noun} {name!r}: there is no file {path}")
    module = _module_of(path, kind.noun)
    return _attribute(module, thing or kind.default(module, path), name, kind)


def _module_of(path: Path, noun: str) -> ModuleType:
    path = path.resolve()
    # Two files of one name are two modules, and a plugin called math.py must not stand for the standard library's.
    module_name = f"rl4dlm_{noun}_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
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


def _attribute(module: ModuleType, thing: str, name: str, kind: Kind) -> Any:
    if hasattr(module, thing):
        return getattr(module, thing)
    path = getattr(module, "__file__", None)
    node = ast.ClassDef if kind.thing == "Class" else ast.FunctionDef
    defined = defined_in(Path(path), node) if path and path.endswith(".py") else []
    raise ValueError(
        f"{kind.noun} {name!r}: {path or module} has no {kind.thing.lower()} {thing!r}; it defines "
        f"{', '.join(defined) or 'none'}{did_you_mean(thing, defined)}"
    )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False
