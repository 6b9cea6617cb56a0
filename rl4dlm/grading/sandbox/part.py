"""What a part's process does: loads the program and answers. Everything here shares its memory with untrusted code.

Owns nothing that can be relied on: the program may change any of it. That is why only *values* are stated here, which
are compared elsewhere, and why the nonce guards against accidents alone.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any

from rl4dlm.grading.sandbox import remote
from rl4dlm.grading.sandbox.data import NotData, encode

ANSWER, CHANNEL = 3, 4  # numbers of the files


def run(asked: dict[str, Any], code: tuple[CodeType, CodeType], nonce: bytes, max_bytes: int) -> None:
    """Runs a part, writes its answer and ends the process.

    Args:
        asked: its `kind`: `call` with an `expression`, `feed`, `inside` with the `tests` that run beside the program,
            `serve` the program to the tests of another process, `test` with the `names` that are over there, where
            the source is that of the tests; `compile` the `sources`.
        code: of the set-up and of the source.
        nonce: what the answer begins with.
        max_bytes: of the answer's value.
    """
    write, leave, describe, dumps = os.write, os._exit, _describe, json.dumps
    kind = asked["kind"]
    random.seed(0)  # with a fixed order of sets: a program has the same value whenever it is graded

    def answer(status: str, message: str = "", value: bytes = b"") -> None:
        text = nonce + dumps([status, message]).encode() + b"\n" + value
        while text:
            text = text[write(ANSWER, text) :]

    try:
        answer("value", value=_WORK[kind](asked, code, max_bytes))
    except NotData as error:
        answer("data", str(error)[:1000])
    except MemoryError:
        answer("memory", "it needs more memory than it may use")
    except remote.Gone:
        answer("gone")
    except remote.Unsendable as error:
        answer("inside", str(error))
    except AssertionError as error:
        answer("wrong" if kind in ("inside", "test") else "error", describe(error))
    except SystemExit as error:
        if kind == "feed" and not error.code:
            answer("value")
        else:
            answer("error", describe(error))
    except BaseException as error:
        answer("error", describe(error))
    if kind == "feed":
        _quietly(sys.stdout.flush)
    leave(0)


def compiled(source: str, name: str = "<program>") -> CodeType | str:
    """Code, or why there is none."""
    try:
        return compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"[:1000]


def load(code: tuple[CodeType, CodeType], name: str) -> dict[str, Any]:
    """What a program defines, as a fresh module of a name."""
    module = ModuleType(name)
    sys.modules[name] = module
    for block in code:
        exec(block, module.__dict__)  # noqa: S102  (sealed: what a sandbox is for)
    return module.__dict__


def _call(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    names = load(code, "program")
    value = eval(compile(asked["expression"], "<call>", "eval", dont_inherit=True), names)  # noqa: S307  (sealed)
    return encode(value, max_bytes)


def _feed(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", errors="surrogateescape")
    sys.argv[:] = ["program"]
    load(code, "__main__")
    sys.stdout.flush()
    return b""


def _inside(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    names = load(code, "program")
    exec(compile(asked["tests"], "<tests>", "exec", dont_inherit=True), names)  # noqa: S102  (sealed)
    return _TRUE


def _serve(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    peer = remote.Peer(CHANNEL, {})
    peer.names = load(code, "program")
    peer.say("ready")
    while True:
        peer.serve(peer.hear())


def _test(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    peer = remote.Peer(CHANNEL)
    if peer.hear() != ["ready"]:  # a program that does not load fails even a test that does not call it
        raise remote.Gone
    setup, tests = code
    module = ModuleType("tests")
    sys.modules["tests"] = module
    exec(setup, module.__dict__)  # noqa: S102  (sealed)
    module.__dict__.update({name: remote.stand_in(peer, name) for name in asked["names"]})
    exec(tests, module.__dict__)  # noqa: S102  (sealed)
    return _TRUE


def _compile(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    found = [compiled(source) for source in asked["sources"]]
    return encode([error if isinstance(error, str) else None for error in found], max_bytes)


_TRUE = b"true"
_WORK = {"compile": _compile, "call": _call, "feed": _feed, "inside": _inside, "serve": _serve, "test": _test}


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
