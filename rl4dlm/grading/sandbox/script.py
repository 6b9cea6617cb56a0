"""Runs a program as Python runs a script: streams at its start, and what is done between its last line and its end.

Owns what a script can see of the interpreter around it. Like everything in a part's process it shares its memory with
untrusted code, and nothing of it is relied on.
"""

from __future__ import annotations

import atexit
import io
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, cast

_KEPT: list[Any] = []  # a stream that is garbage closes its file, also under one that a program has put around it


def run_script(load: Callable[[], dict[str, Any]]) -> None:
    """Runs a program with the files 0 and 1 as its streams, and then what it has left for its end.

    Args:
        load: runs the program's statements and returns what they define.

    Raises:
        BaseException: what the program has raised.
    """
    _open_streams()
    sys.argv[:] = ["program.py"]
    names: dict[str, Any] = {}
    try:
        names = load()
    finally:
        _end(names or vars(sys.modules.get("__main__", sys)))


def _open_streams() -> None:
    reader = io.BufferedReader(io.FileIO(0, "r", closefd=False))
    writer = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
    for name, mode, file in (("stdin", "r", reader), ("stdout", "w", writer)):
        # As Python opens them: line ends come and go as they are.
        stream: Any = io.TextIOWrapper(cast(BinaryIO, file), encoding="utf-8", errors="surrogateescape", newline="\n")
        stream.mode = mode
        _KEPT.append((getattr(sys, name), file, stream))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _end(names: dict[str, Any]) -> None:
    """As the interpreter ends: it waits for threads, then does what `atexit` has, then writes what is not written."""
    threading = sys.modules.get("threading")
    if threading is not None:
        _quietly(getattr(threading, "_shutdown", None))
    _quietly(atexit._run_exitfuncs)
    _quietly(getattr(sys.stdout, "flush", None))
    for value in [*names.values()]:  # files that a program has opened, which end with it
        if issubclass(type(value), io.IOBase):
            _quietly(value.flush)
    for _, _, stream in _KEPT:
        _quietly(stream.flush)


def _quietly(action: Callable[[], Any] | None) -> None:
    try:
        if action is not None:
            action()
    except BaseException:
        return
