"""Programs run by a service: what is sent, what its answer means, and many requests at once.

Owns what the adapters share. A request is one part of a program: a script that loads the program and prints a line with
the part's value as data, after a nonce. The line comes from the process that the program runs in, so a program that
looks for the nonce can print such a line itself. It can only state a value, which is then compared here; but tests
that are run as source (`Check`) share that process, too, and can be tampered with. Their results say so.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rl4dlm.grading.sandbox.data import NotData, decode
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Check, Feed, Part, Program, Result

_STATUSES = frozenset(("value", "error", "wrong", "memory", "data"))

# What the service runs. The program's prints go nowhere, so that they cannot crowd out the answer.
_DRIVER = """
import json, os, sys, types
asked = json.loads({asked!r})
def main():
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    write, leave, dumps = os.write, os._exit, json.dumps
    helper = types.ModuleType("helper")
    sys.modules["helper"] = helper
    exec(asked["data"], helper.__dict__)
    encode, NotData = helper.encode, helper.NotData
    module = types.ModuleType("program")
    sys.modules["program"] = module
    value = ""
    try:
        exec(compile(asked["setup"], "<setup>", "exec"), module.__dict__)
        exec(compile(asked["source"], "<program>", "exec"), module.__dict__)
        if asked["check"] is not None:
            exec(compile(asked["check"], "<test>", "exec"), module.__dict__)
            value = "true"
        else:
            result = eval(compile(asked["expression"], "<call>", "eval"), module.__dict__)
            value = encode(result, asked["most"]).decode()
        answer = ["value", ""]
    except NotData as error:
        answer = ["data", str(error)[:1000]]
    except MemoryError:
        answer = ["memory", ""]
    except AssertionError as error:
        answer = ["error" if asked["check"] is None else "wrong", "AssertionError: " + str(error)[:980]]
    except BaseException as error:
        answer = ["error", (type(error).__name__ + ": " + str(error))[:1000]]
    text = ("\\n" + asked["nonce"] + dumps([*answer, value]) + "\\n").encode()
    while text:
        text = text[write(out, text):]
    leave(0)
main()
"""


class Script(NamedTuple):
    """What a service is asked to run."""

    source: str
    stdin: str | None
    nonce: str


class Answer(NamedTuple):
    """What a service says of a script: whether it came to its end, with which status, and what it printed."""

    finished: bool
    exit_status: int
    stdout: str
    stderr: str = ""


class LostError(Exception):
    """The service failed, not the program."""


def script(program: Program, part: Part, limits: Limits) -> Script:
    """The script for one part of a program."""
    nonce = secrets.token_hex(16)
    if isinstance(part, Feed):
        return Script(f"{program.setup}\n{program.source}" if program.setup else program.source, part.stdin, nonce)
    asked = {
        "setup": program.setup,
        "source": program.source,
        "check": part.source if isinstance(part, Check) else None,
        "expression": None if isinstance(part, Check) else part.expression,
        "data": _encoder(),
        "most": limits.output_bytes,
        "nonce": nonce,
    }
    return Script(_DRIVER.format(asked=json.dumps(asked)), None, nonce)


def result(part: Part, sent: Script, answer: Answer, limits: Limits) -> Result:
    """What an answer says of a part."""
    inside = isinstance(part, Check)
    if not answer.finished:
        return Result("timeout", message="the service ended it", inside=inside)
    if isinstance(part, Feed):
        if answer.exit_status != 0:
            return Result("error", message=answer.stderr.strip().rpartition("\n")[2][:1000])
        if len(answer.stdout.encode()) > limits.output_bytes:
            return Result("output")
        return Result("value", answer.stdout)
    lines = [line for line in answer.stdout.splitlines() if line.startswith(sent.nonce)]
    try:
        status, message, value = json.loads(lines[-1][len(sent.nonce) :])
        if status not in _STATUSES or not isinstance(message, str) or not isinstance(value, str):
            raise ValueError
        if status != "value":
            return Result(status, message=message, inside=inside)
        return Result("value", decode(value.encode()), inside=inside)
    except NotData as error:
        return Result("data", message=str(error), inside=inside)
    except (IndexError, ValueError, TypeError, RecursionError):
        return Result("ended", message=f"it ended with status {answer.exit_status} without an answer", inside=inside)


def run_all(
    programs: Sequence[Program],
    send: Callable[[Script, Limits], Answer],
    *,
    workers: int,
    limits: Limits,
    budget: float,
) -> list[list[Result]]:
    """Sends all parts of all programs, so many at once.

    Args:
        programs: what to run.
        send: runs one script; raises LostError where the service fails.
        workers: requests at once.
        limits: for each part.
        budget: seconds for all; a part whose turn comes later has the status `budget`.
    """
    end = time.monotonic() + budget

    def one(program: Program, part: Part) -> Result:
        if time.monotonic() >= end:
            return Result("budget")
        sent = script(program, part, limits)
        try:
            return result(part, sent, send(sent, limits), limits)
        except LostError as error:
            return Result("lost", message=str(error)[:1000])

    with ThreadPoolExecutor(max_workers=workers) as threads:
        waiting = [[threads.submit(one, program, part) for part in program.parts] for program in programs]
        return [[future.result() for future in row] for row in waiting]


@cache
def _encoder() -> str:
    return Path(__file__).with_name("data.py").read_text(encoding="utf-8")


def as_text(value: Any) -> str:
    """A field of a service's answer as text."""
    return value if isinstance(value, str) else ""
