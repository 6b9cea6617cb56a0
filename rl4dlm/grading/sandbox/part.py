"""What a part's process does: loads the program and answers. Everything here shares its memory with untrusted code.

Owns nothing that can be relied on: the program may change any of it. That is why only *values* are stated here, which
are compared elsewhere, and why the nonce guards against accidents alone.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any

from rl4dlm.grading.sandbox.data import NotData, encode

ANSWER, CHANNEL = 3, 4  # numbers of the files


def run(asked: dict[str, Any], code: tuple[CodeType, CodeType], nonce: bytes, max_bytes: int) -> None:
    """Runs a part, writes its answer and ends the process."""
    write, leave, describe = os.write, os._exit, _describe

    def answer(status: str, message: str = "", value: bytes = b"") -> None:
        text = nonce + json.dumps([status, message]).encode() + b"\n" + value
        while text:
            text = text[write(ANSWER, text) :]

    kind = asked["kind"]
    try:
        if kind == "feed":
            _feed(code)
            answer("value")
        else:
            names = load(code, "program")
            answer("value", value=encode(_evaluate(asked["expression"], names), max_bytes))
    except NotData as error:
        answer("data", str(error)[:1000])
    except MemoryError:
        answer("memory", "it needs more memory than it may use")
    except SystemExit as error:
        if kind == "feed" and not error.code:
            answer("value")
        else:
            answer("error", describe(error))
    except BaseException as error:
        answer("error", describe(error))
    if kind == "feed":
        for stream in (sys.stdout, sys.stderr):
            _quietly(stream.flush)
    leave(0)


def load(code: tuple[CodeType, CodeType], name: str) -> dict[str, Any]:
    """What a program defines, as a fresh module of a name."""
    module = ModuleType(name)
    sys.modules[name] = module
    for block in code:
        exec(block, module.__dict__)  # noqa: S102  (sealed: what a sandbox is for)
    return module.__dict__


def _evaluate(expression: str, names: dict[str, Any]) -> Any:
    return eval(compile(expression, "<call>", "eval", dont_inherit=True), names)  # noqa: S307  (sealed)


def _feed(code: tuple[CodeType, CodeType]) -> None:
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", errors="surrogateescape")
    sys.argv[:] = ["program"]
    load(code, "__main__")
    sys.stdout.flush()


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:1000]
    except BaseException:
        return type(error).__name__[:1000]


def _quietly(action: Callable[[], Any]) -> None:
    try:
        action()
    except BaseException:
        return
