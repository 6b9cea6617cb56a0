"""What a part's process does: loads the program and answers. Everything here shares its memory with untrusted code.

Owns nothing that can be relied on: the program may change any of it. That is why only *values* are stated here, which
are compared elsewhere, and why the nonce guards against accidents alone.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any

from rl4dlm.grading.sandbox import remote, script
from rl4dlm.grading.sandbox.data import NotData, encode
from rl4dlm.grading.sandbox.stateless import Watch

ANSWER, CHANNEL = 3, 4  # numbers of the files
_COMPILING = 0.5  # seconds of a processor for compiling a source: a few lines can be made to take minutes and gigabytes


def run(
    asked: list[dict[str, Any]],
    setup: CodeType,
    source: str,
    nonce: bytes,
    max_bytes: int,
    more_time: Callable[[], None],
) -> None:
    """Runs a part, or the first few of several calls, writes their answers and ends the process.

    Calls go on in this process as long as the program keeps nothing from one to the next (`stateless`); who asked sees
    by the number of answers how far they came.

    Args:
        asked: of each part its `kind`: `call` with an `expression`, `feed`, `inside` with the `tests` that run beside
            the program, `serve` the program to the tests of another process, `test` with the `names` that are over
            there, where the source is that of the tests; `compile` a `source`. What comes together is of one kind,
            `call` or `compile`.
        setup: code that runs before the program.
        source: of the program. It is compiled here: of what a compiler can be made to do, this process alone suffers.
        nonce: what each answer begins with.
        max_bytes: of an answer's value.
        more_time: grants a next call its time of a processor.
    """
    write, leave, describe, dumps, clock = os.write, os._exit, _describe, json.dumps, time.monotonic
    kind = asked[0]["kind"]

    def answer(status: str, message: str = "", value: bytes = b"") -> tuple[str, str]:
        text = nonce + dumps([status, message, len(value), clock()]).encode() + b"\n" + value
        while text:
            text = text[write(ANSWER, text) :]
        return status, message

    def attempt(work: Callable[[], bytes]) -> tuple[str, str]:
        random.seed(0)  # with a fixed order of sets: a program has the same value whenever it is graded
        try:
            return answer("value", value=work())
        except NotData as error:
            return answer("data", str(error)[:1000])
        except MemoryError:
            return answer("memory", "it needs more memory than it may use")
        except remote.Gone:
            return answer("gone")
        except remote.Unsendable as error:
            return answer("inside", str(error))
        except AssertionError as error:
            return answer("wrong" if kind in ("inside", "test") else "error", describe(error))
        except SystemExit as error:
            return answer("value") if kind == "feed" and not error.code else answer("error", describe(error))
        except BaseException as error:
            return answer("error", describe(error))

    if kind == "compile":
        for item in asked:
            more_time()
            error = compiled(item["source"], seconds=_COMPILING)
            answer("syntax", error) if isinstance(error, str) else answer("value", value=b"null")
        leave(0)
    block = compiled(source, seconds=_COMPILING)
    if isinstance(block, str):
        answer("syntax", block)
        leave(0)
    code = (setup, block)
    if kind != "call":
        attempt(lambda: _WORK[kind](asked[0], code, max_bytes))
        leave(0)
    loaded: list[tuple[dict[str, Any], Watch]] = []

    def first() -> bytes:
        try:
            names = load(code, "program")
        except MemoryError:
            raise
        except BaseException as error:
            raise NotLoaded(describe(error)) from None
        loaded.append((names, Watch(names)))
        return _value(asked[0], names, max_bytes)

    said = attempt(first)
    for item in asked[1:]:
        if not loaded:  # what does not load does not do so for the others either
            said = answer(*said)
            continue
        names, watch = loaded[0]
        if said[0] == "memory" or not watch.unchanged():
            break
        more_time()
        said = attempt(functools.partial(_value, item, names, max_bytes))
    leave(0)


class NotLoaded(BaseException):
    """The program raised before anything was asked of it, which is no answer to a call that should raise."""


def compiled(source: str, name: str = "<program>", seconds: float = 0.0) -> CodeType | str:
    """Code, or why there is none.

    Args:
        source: statements.
        name: in messages.
        seconds: of a processor, after which SIGPROF ends this process; 0 for any time.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return compile(source.removeprefix("\ufeff"), name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"[:1000]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def load(code: tuple[CodeType, CodeType], name: str) -> dict[str, Any]:
    """What a program defines, as a fresh module of a name."""
    module = ModuleType(name)
    module.__file__ = "program.py"
    sys.modules[name] = module
    for block in code:
        exec(block, module.__dict__)  # noqa: S102  (sealed: what a sandbox is for)
    return module.__dict__


def _value(asked: dict[str, Any], names: dict[str, Any], max_bytes: int) -> bytes:
    value = eval(compile(asked["expression"], "<call>", "eval", dont_inherit=True), names)  # noqa: S307  (sealed)
    return encode(value, max_bytes)


def _feed(asked: dict[str, Any], code: tuple[CodeType, CodeType], max_bytes: int) -> bytes:
    script.run_script(lambda: load(code, "__main__"))
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
    module.__dict__.update(remote.constants(peer, asked["names"]))
    try:
        exec(tests, module.__dict__)  # noqa: S102  (sealed)
    finally:
        if peer.failed is not None:  # whatever the tests made of it: `except:` and the like
            raise peer.failed
    return _TRUE if peer.asked else b'"uncalled"'


_TRUE = b"true"
_WORK = {"feed": _feed, "inside": _inside, "serve": _serve, "test": _test}


def _describe(error: BaseException) -> str:
    """Its type and message; behind a type of the program's, in brackets, Python's own that it derives from."""
    name = type(error).__name__
    try:
        kinds = type(error).__mro__
        if getattr(builtins, name, None) is not kinds[0] and kinds[0] is not NotLoaded:
            known = [kind.__name__ for kind in kinds[1:] if vars(builtins).get(kind.__name__) is kind]
            usual = () if "Exception" in known else ("BaseException",)
            known = [*(each for each in known if each not in ("object", "Exception", "BaseException")), *usual]
            name = f"{name}({', '.join(known)})" if known else name
        return f"{name}: {error}"[:1000]
    except BaseException:
        return name[:1000]
