"""One program in its keeper: reads what is asked, has each part run in a process of its own, sends what came of it.

Owns the keeper's loop and its deadlines. The keeper compiles the source once but never runs it: each part is run by a
child (`rl4dlm.grading.sandbox.part`), which loads the program afresh and may start no process, so that one child and
its threads are all there ever is, and their memory has one limit. Answers and printed text are in files in memory,
whose size is limited, so that nothing needs to be read while a program runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from types import CodeType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from rl4dlm.grading.sandbox import isolation, part as parts
from rl4dlm.grading.sandbox.frames import read_frame, write_frame

if TYPE_CHECKING:
    from rl4dlm.grading.sandbox.limits import Limits

# What a part's process may say of itself, by what it was asked.
_STATUSES = {
    "compile": ("value",),
    "call": ("value", "error", "memory", "data"),
    "feed": ("value", "error", "memory"),
    "serve": ("error", "memory", "gone"),
    "test": ("value", "wrong", "error", "memory", "data", "gone", "inside"),
    "inside": ("value", "wrong", "error", "memory"),
}


def serve(job: int, channel: int, tasks: int) -> None:
    """Runs one program.

    Args:
        job: a stream on which `rl4dlm.grading.sandbox.frames` come and go: the request, then a frame for each part.
        channel: a stream between the process that holds tests and the one that holds the program; -1 without.
        tasks: of `isolation.Prepared`.
    """
    request = json.loads(read_frame(job))
    limits: Any = SimpleNamespace(**request["limits"])
    compiled = compile_all(request)
    if isinstance(compiled, str):
        for number in range(len(request["parts"])):
            send(job, number, "syntax", compiled)
        return
    end, late, room = time.monotonic() + limits.program_seconds, 0, limits.output_bytes
    for number, asked in enumerate(request["parts"]):
        seconds = min(limits.seconds, end - time.monotonic())
        if seconds <= 0 or late >= limits.timeouts:
            send(job, number, "timeout", "parts before it took the time")
            continue
        keeper = _Part(asked, limits, channel, tasks)
        try:
            status, message, value = keeper.run(compiled, seconds)
        finally:
            keeper.close()
        late += status == "timeout"
        room -= len(value)
        if room < 0:
            status, message, value = "output", f"its answers take more than {limits.output_bytes} bytes", b""
        send(job, number, status, message, value)


def compile_all(request: dict[str, Any]) -> tuple[CodeType, CodeType] | str:
    """The code of the set-up and of the source, or why there is none."""
    setup = parts.compiled(request["setup"], "<setup>")
    source = parts.compiled(request["source"])
    if isinstance(setup, str) or isinstance(source, str):
        return source if isinstance(source, str) else f"set-up: {setup}"
    return setup, source


class _Part:
    """A part's files and its process."""

    def __init__(self, asked: dict[str, Any], limits: Limits, channel: int, tasks: int) -> None:
        self.asked, self.limits, self.channel, self.tasks = asked, limits, channel, tasks
        self.answer = os.memfd_create("answer")
        self.nonce = os.urandom(16).hex().encode()
        self.stdin = self.stdout = -1
        if asked["kind"] == "feed":
            self.stdin, self.stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
            os.pwrite(self.stdin, asked["stdin"].encode("utf-8", "surrogatepass"), 0)

    def close(self) -> None:
        for handle in (self.answer, self.stdin, self.stdout):
            if handle >= 0:
                os.close(handle)

    def run(self, code: tuple[CodeType, CodeType], seconds: float) -> tuple[str, str, bytes]:
        """Status, message and value of the part."""
        due = time.monotonic() + seconds
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            _leave(lambda: self._child(keeper, code))
        ended = wait_for(pid, due)
        if ended is None:
            return "timeout", f"it took longer than {seconds:g} seconds", b""
        status, used = ended
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            late = number == signal.SIGXCPU or (number == signal.SIGKILL and used >= self.limits.cpu_seconds)
            if late:
                return "timeout", f"it used more than {self.limits.cpu_seconds:g} seconds of a processor", b""
            if number == signal.SIGXFSZ:
                return "output", "it wrote more than it may", b""
            return "ended", f"the process was ended by signal {number}", b""
        answer = self._answer()
        if self.stdout >= 0:
            return self._printed(answer, os.WEXITSTATUS(status))
        if answer is None:
            return "ended", f"the process ended with status {os.WEXITSTATUS(status)} without an answer", b""
        return answer

    def _child(self, keeper: int, code: tuple[CodeType, CodeType]) -> None:
        isolation.die_with_parent(keeper)
        os.setsid()
        if self.stdout >= 0:
            os.dup2(self.stdin, 0)
            os.dup2(self.stdout, 1)
        handles = [self.answer, self.channel] if self.channel >= 0 else [self.answer]
        safe = [fcntl.fcntl(handle, fcntl.F_DUPFD, 64) for handle in handles]
        for number, handle in enumerate(safe, 3):
            os.dup2(handle, number, inheritable=False)
        os.closerange(3 + len(safe), os.sysconf("SC_OPEN_MAX"))
        asked, nonce = self.asked, self.nonce
        isolation.seal(self.limits, self.tasks)
        parts.run(asked, code, nonce, self.limits.output_bytes)

    def _answer(self) -> tuple[str, str, bytes] | None:
        """What the child wrote. Only its form is trusted, and that is checked."""
        most = self.limits.output_bytes + 8192
        text = os.pread(self.answer, most + 1, 0)
        if not text.startswith(self.nonce) or len(text) > most:
            return None
        header, _, value = text[len(self.nonce) :].partition(b"\n")
        try:
            status, message = json.loads(header)
        except (ValueError, TypeError, RecursionError):
            return None
        if status not in _STATUSES[self.asked["kind"]] or not isinstance(message, str):
            return None
        return status, message[:1000], value

    def _printed(self, answer: tuple[str, str, bytes] | None, status: int) -> tuple[str, str, bytes]:
        if os.fstat(self.stdout).st_size > self.limits.output_bytes:
            return "output", f"it printed more than {self.limits.output_bytes} bytes", b""
        if answer is not None and answer[0] != "value":
            return answer
        if status != 0:
            return "error", f"SystemExit: {status}", b""
        text = os.pread(self.stdout, self.limits.output_bytes, 0).decode("utf-8", "replace")
        return "value", "", json.dumps(text).encode()


def _leave(work: Callable[[], None]) -> None:
    """Runs a child's work and ends the process, whatever happens."""
    try:
        work()
    except BaseException as error:
        sys.stderr.write(f"{error}\n")
    finally:
        os._exit(70)


def wait_for(pid: int, due: float) -> tuple[int, float] | None:
    """A child's status and the seconds of a processor that it used, once it has ended; None if it was late."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        late = not poll.poll(max(0.0, due - time.monotonic()) * 1000)
    finally:
        os.close(handle)
    if late:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    return None if late else (status, used.ru_utime + used.ru_stime)


def send(job: int, number: int, status: str, message: str = "", value: bytes = b"") -> None:
    """A part's result."""
    header = json.dumps({"part": number, "status": status, "message": message}).encode()
    write_frame(job, header + b"\n" + value)
