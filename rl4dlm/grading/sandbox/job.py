"""One program in its keeper: reads what is asked, has each part run in a process of its own, sends what came of it.

Owns the keeper's loop and its deadlines. The keeper neither runs the source nor compiles it: a part is run by a child
(`rl4dlm.grading.sandbox.part`), which loads the program afresh and may start no process, so that one child and
its threads are all there ever is, and their memory has one limit. A child goes on with the next call where the program
keeps nothing from one to the next. Answers and printed text are in files in memory,
whose size is limited, so that nothing needs to be read while a program runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from types import CodeType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from rl4dlm.grading.sandbox import isolation, kernel, part as parts
from rl4dlm.grading.sandbox.frames import read_frame, write_frame

if TYPE_CHECKING:
    from rl4dlm.grading.sandbox.limits import Limits

# What a part's process may say of itself, by what it was asked.
_STATUSES = {
    "compile": ("value", "syntax"),
    "call": ("value", "error", "memory", "data", "syntax"),
    "feed": ("value", "error", "memory", "syntax"),
    "serve": ("error", "memory", "gone", "syntax"),
    "test": ("value", "wrong", "error", "memory", "data", "gone", "inside", "syntax"),
    "inside": ("value", "wrong", "error", "memory", "syntax"),
}
_TOGETHER = ("call", "compile")  # of which several may be asked of one process
_FULL = 0.9  # share of its seconds that a part must have had to be out of time


def serve(job: int, channel: int, prepared: isolation.Prepared) -> None:
    """Runs one program.

    Args:
        job: a stream on which `rl4dlm.grading.sandbox.frames` come and go: the request, then a frame for each part.
        channel: a stream between the process that holds tests and the one that holds the program; -1 without.
        prepared: by the server.
    """
    request = json.loads(read_frame(job))
    limits: Any = SimpleNamespace(**request["limits"])
    setup = parts.compiled(request["setup"], "<setup>")
    if isinstance(setup, str):
        for number in range(len(request["parts"])):
            send(job, number, "syntax", f"set-up: {setup}")
        return
    end, late, room = time.monotonic() + limits.program_seconds, 0, limits.output_bytes
    asked, number = request["parts"], 0
    while number < len(asked):
        if late >= limits.timeouts or time.monotonic() >= end:
            over = late < limits.timeouts
            send(job, number, "over" if over else "timeout", "parts before it took the time")
            number += 1
            continue
        process = _Process(_together(asked[number:]), limits, channel, prepared)
        try:
            answers = process.run(setup, request["source"], end)
        finally:
            process.close()
        for status, message, value in answers:
            late += status == "timeout"
            room -= len(value)
            if room < 0:
                status, message, value = "output", f"its answers take more than {limits.output_bytes} bytes", b""
            send(job, number, status, message, value)
            number += 1
            while status == "syntax" and process.kind != "compile" and number < len(asked):  # so it is for all of them
                send(job, number, status, message)
                number += 1


def _together(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first part, and those that follow it and may be asked of the same process."""
    kind = asked[0]["kind"]
    alike = list(itertools.takewhile(lambda part: part["kind"] == kind, asked))
    return alike if kind in _TOGETHER else asked[:1]


_Answer = tuple[str, str, bytes]  # status, message, value


class _Process:
    """The process of a part, or of the first few of several calls, and its files."""

    def __init__(self, asked: list[dict[str, Any]], limits: Limits, channel: int, prepared: isolation.Prepared) -> None:
        self.asked, self.limits, self.channel, self.prepared = asked, limits, channel, prepared
        self.kind = asked[0]["kind"]
        self.answer = _file("answer")
        self.sealed, self.say_sealed = os.pipe()
        self.nonce = os.urandom(16).hex().encode()
        self.stdin = self.stdout = -1
        if self.kind == "feed":
            self.stdin, self.stdout = _file("stdin"), _file("stdout")
            os.pwrite(self.stdin, asked[0]["stdin"].encode("utf-8", "surrogatepass"), 0)

    def close(self) -> None:
        for handle in (self.answer, self.sealed, self.say_sealed, self.stdin, self.stdout):
            if handle >= 0:
                os.close(handle)

    def run(self, setup: CodeType, source: str, end: float) -> list[_Answer]:
        """At least one answer; where there are fewer than parts, the rest needs another process.

        Args:
            setup: runs before the program.
            source: of the program.
            end: time at which all parts must have ended. One that has not had its own time by then is `over`.
        """
        seconds, begun = self.limits.seconds, time.monotonic()
        due = min(begun + seconds, end)
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            _leave(lambda: self._child(keeper, setup, source))
        handle, ended, known = kernel.process_handle(pid), False, 0
        try:
            while not (ended := _ends(pid, handle, due)):
                answers, told = self._answers()
                if len(answers) <= known or min(told + seconds, end) <= time.monotonic():
                    break
                begun, due, known = told, min(told + seconds, end), len(answers)  # it is at the next part
            if not ended:
                os.kill(pid, signal.SIGKILL)
        finally:
            if handle >= 0:
                os.close(handle)
            if self.prepared.level == isolation.LIMITS:  # it may have started others
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            _, status, used = os.wait4(pid, 0)
        os.set_blocking(self.sealed, False)
        try:
            os.read(self.sealed, 1)
        except BlockingIOError:  # nothing of the program was run
            return [("lost", "its process could not be sealed", b"")]
        answers, _ = self._answers()
        if not ended:
            late = ("timeout", f"it took longer than {seconds:g} seconds", b"")
            if due - begun < _FULL * seconds:
                late = ("over", "parts before it took the time", b"")
            if len(answers) < len(self.asked):
                return [*answers, late]
            return answers if self.stdout < 0 else [self._printed(answers)]
        if self.stdout >= 0:
            return [self._failure(status, used.ru_utime + used.ru_stime) or self._printed(answers)]
        failure = self._failure(status, used.ru_utime + used.ru_stime)
        if self.kind == "compile" and failure is not None and len(answers) < len(self.asked):
            return [*answers, failure]
        return answers or [failure or ("ended", "the process ended with status 0 without an answer", b"")]

    def _failure(self, status: int, used: float) -> _Answer | None:
        """Why a process did not end as it should."""
        if not os.WIFSIGNALED(status):
            code = os.WEXITSTATUS(status)
            if code and self.stdout >= 0:
                return ("error", f"SystemExit: {code}", b"")
            return ("ended", f"the process ended with status {code} without an answer", b"") if code else None
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and used >= self.limits.cpu_seconds):
            return "timeout", f"it used more than {self.limits.cpu_seconds:g} seconds of a processor", b""
        if number == signal.SIGPROF:
            return "syntax", "compiling it took too long", b""
        if number == signal.SIGXFSZ:
            return "output", "it wrote more than it may", b""
        return "ended", f"the process was ended by signal {number}", b""

    def _child(self, keeper: int, setup: CodeType, source: str) -> None:
        isolation.die_with_parent(keeper)
        os.setsid()
        if self.stdout >= 0:
            os.dup2(self.stdin, 0)
            os.dup2(self.stdout, 1)
        handles = [self.answer, self.channel] if self.channel >= 0 else [self.answer]
        handles.append(self.say_sealed)
        safe = [fcntl.fcntl(handle, fcntl.F_DUPFD, 64) for handle in handles]
        for number, handle in enumerate(safe, 3):
            os.dup2(handle, number, inheritable=False)
        os.closerange(3 + len(safe), os.sysconf("SC_OPEN_MAX"))
        asked, nonce, limits = self.asked, self.nonce, self.limits
        isolation.seal(limits, self.prepared, len(asked))
        os.write(2 + len(safe), b"1")
        os.close(2 + len(safe))
        parts.run(asked, setup, source, nonce, limits.output_bytes, lambda: isolation.more_time(limits))

    def _answers(self) -> tuple[list[_Answer], float]:
        """What the child wrote so far, and when it wrote the last of it. Its form is checked, the rest is its word."""
        text = os.pread(self.answer, self.limits.output_bytes + 8192 * len(self.asked), 0)
        found: list[_Answer] = []
        told = 0.0
        while text.startswith(self.nonce) and len(found) < len(self.asked):
            header, _, rest = text[len(self.nonce) :].partition(b"\n")
            try:
                status, message, length, stamp = json.loads(header)
                if status not in _STATUSES[self.kind] or not isinstance(message, str) or not 0 <= length <= len(rest):
                    break
                told = min(float(stamp), time.monotonic())
            except (ValueError, TypeError, RecursionError, OverflowError):
                break
            found.append((status, message[:1000], rest[:length]))
            text = rest[length:]
        return found, told

    def _printed(self, answers: list[_Answer]) -> _Answer:
        if os.fstat(self.stdout).st_size > self.limits.output_bytes:
            return "output", f"it printed more than {self.limits.output_bytes} bytes", b""
        if answers and answers[0][0] != "value":
            return answers[0]
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


def _file(name: str) -> int:
    """A file that has no name for others."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    handle, path = tempfile.mkstemp()
    os.unlink(path)
    return handle


def _ends(pid: int, handle: int, due: float) -> bool:
    """Whether a process has ended, once it has or time is up."""
    while handle < 0:
        if kernel.has_ended(pid) or time.monotonic() >= due:
            return kernel.has_ended(pid)
        time.sleep(kernel.LOOK)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(max(0.0, due - time.monotonic()) * 1000))


def send(job: int, number: int, status: str, message: str = "", value: bytes = b"") -> None:
    """A part's result."""
    header = json.dumps({"part": number, "status": status, "message": message}).encode()
    write_frame(job, header + b"\n" + value)
