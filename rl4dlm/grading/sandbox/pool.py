"""The sandbox seen from the trainer: hands programs to a server and collects what came of their parts.

Owns the server's process, which programs run at once, and the deadlines that hold if everything else fails. Programs
themselves are never executed here, nor is what they wrote: answers are decoded as plain data.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rl4dlm.grading.pool import current_settings
from rl4dlm.grading.sandbox.data import NotData, decode
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Call, Feed, Part, Program, Result

_GRACE = 2.0  # seconds that a keeper has beyond its program's
_LONGEST = 1 << 26
_PACKAGE = Path(__file__).resolve().parent
# The server has the standard library alone. The packages above its own are empty there, so that nothing else is loaded.
_BOOT = """
import sys, types
for name, path in zip(("rl4dlm", "rl4dlm.grading", "rl4dlm.grading.sandbox"), sys.argv[3:]):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
from rl4dlm.grading.sandbox import server
server.main()
"""


class SandboxError(RuntimeError):
    """The sandbox cannot be offered: nothing was run."""


class Server:
    """The process that forks a keeper for each program, at one level.

    Raises:
        SandboxError: the level is not available here, and why.
    """

    def __init__(self, level: str, startup_seconds: float) -> None:
        self.level = level
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        folders = [str(_PACKAGE.parents[1]), str(_PACKAGE.parent), str(_PACKAGE)]
        # -P, -s, -S and an environment of one: as -I, but sets are in the same order every time.
        command = [sys.executable, "-P", "-s", "-S", "-B", "-c", _BOOT, str(theirs.fileno()), level, *folders]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
                cwd="/",
            )
        try:
            ours.settimeout(startup_seconds)
            said: dict[str, Any] = json.loads(ours.recv(65536) or b"{}")
        except OSError:
            said = {"failed": f"its server did not start in {startup_seconds:g} seconds"}
        if "ready" not in said:
            status = self.stop()
            raise SandboxError(said.get("failed", f"its server ended with status {status}"))
        ours.setblocking(False)

    def start(self, number: int, seconds: float, limits: Limits, handles: Sequence[socket.socket]) -> None:
        """Has a keeper forked, which gets the other ends of streams."""
        message = {"start": number, "seconds": seconds, "limits": asdict(limits)}
        socket.send_fds(self.control, [json.dumps(message).encode()], [handle.fileno() for handle in handles])

    def kill(self, number: int) -> None:
        """Ends a keeper and what it runs."""
        self.control.send(json.dumps({"kill": number}).encode())

    def stop(self) -> int:
        """Ends the server and all that it runs; its exit status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        status = self.process.wait()
        self.control.close()
        return status


@dataclass
class _Job:
    """A program, or one of its checks, on its way."""

    row: int
    parts: list[int]
    request: bytes
    seconds: float
    stream: socket.socket | None = None
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    received: bytearray = field(default_factory=bytearray)
    due: float = 0.0
    failed: str = ""


class Sandbox:
    """Runs programs of untrusted source.

    Args:
        level: of `isolation.LEVELS`.
        workers: programs that run at once.
    """

    def __init__(self, level: str, workers: int, startup_seconds: float = 120.0) -> None:
        self.level, self.workers, self.startup_seconds = level, workers, startup_seconds
        self._adopt_process()

    def _adopt_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._servers: list[Server] = []
        self._numbers = 0
        weakref.finalize(self, _stop_in, self._pid, self._servers)

    def run(self, programs: Sequence[Program], limits: Limits, budget: float) -> list[list[Result]]:
        """As `run_programs`."""
        if os.getpid() != self._pid:
            self._adopt_process()
        with self._lock:
            try:
                return _Batch(self, programs, limits, budget).run()
            except BaseException:
                _stop_in(self._pid, self._servers)
                raise

    def close(self) -> None:
        """Ends all processes. The sandbox may be used again."""
        if os.getpid() == self._pid:
            with self._lock:
                _stop_in(self._pid, self._servers)

    def server(self) -> Server:
        """The server, started where there is none."""
        if not self._servers:
            self._servers.append(Server(self.level, self.startup_seconds))
        return self._servers[0]

    def number(self) -> int:
        """A fresh id of a job."""
        self._numbers += 1
        return self._numbers


class _Batch:
    def __init__(self, sandbox: Sandbox, programs: Sequence[Program], limits: Limits, budget: float) -> None:
        self.sandbox, self.limits, self.budget = sandbox, limits, budget
        self.results: list[list[Result | None]] = [[None] * len(program.parts) for program in programs]
        self.waiting = deque(job for row, program in enumerate(programs) for job in self._jobs(row, program))
        self.running: dict[int, _Job] = {}

    def _jobs(self, row: int, program: Program) -> list[_Job]:
        parts = list(range(len(program.parts)))
        request = {
            "source": program.source,
            "setup": program.setup,
            "parts": [_asked(part) for part in program.parts],
            "limits": asdict(self.limits),
        }
        text = json.dumps(request).encode()
        seconds = min(self.limits.program_seconds, self.limits.seconds * len(parts)) + _GRACE
        return [_Job(row, parts, struct.pack("!I", len(text)) + text, seconds)] if parts else []

    def run(self) -> list[list[Result]]:
        self.server = self.sandbox.server()
        end = time.monotonic() + self.budget
        with selectors.DefaultSelector() as self.selector:
            self.selector.register(self.server.control, selectors.EVENT_READ)
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.sandbox.workers:
                    self._start(self.waiting.popleft())
                nearest = min(end, *(job.due for job in self.running.values()))
                for key, events in self.selector.select(max(0.0, nearest - time.monotonic())):
                    if key.data is None:
                        self._heard()
                    else:
                        self._move(key.data, events)
                now = time.monotonic()
                if now >= end:
                    self._give_up()
                for number in [number for number, job in self.running.items() if now >= job.due]:
                    self.server.kill(number)
                    self.running[number].due = now + _GRACE
                    self.running[number].failed = "timeout"
        return [[result or Result("budget") for result in row] for row in self.results]

    def _start(self, job: _Job) -> None:
        number = self.sandbox.number()
        ours, theirs = socket.socketpair()
        with theirs:
            self.server.start(number, job.seconds, self.limits, [theirs])
        ours.setblocking(False)
        job.stream, job.unsent = ours, memoryview(job.request)
        job.due = time.monotonic() + job.seconds + _GRACE
        self.running[number] = job
        self.selector.register(ours, selectors.EVENT_READ | selectors.EVENT_WRITE, job)

    def _heard(self) -> None:
        said: dict[str, Any] = json.loads(self.server.control.recv(4096) or b"{}")
        job = self.running.pop(said.get("ended", -1), None)
        if job is None:
            return
        if job.stream is not None:
            self._move(job, selectors.EVENT_READ)
        self._close(job)
        for part in job.parts:
            if self.results[job.row][part] is None:
                self.results[job.row][part] = self._missing(job, said["status"])

    def _missing(self, job: _Job, status: int) -> Result:
        """Why a keeper did not answer. It runs nothing of the program, but compiles it."""
        if job.failed == "timeout" or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return Result("timeout", message="its processes did not end in time")
        if status >= 0 and os.WIFSIGNALED(status):
            return Result("ended", message=f"compiling it ended by signal {os.WTERMSIG(status)}")
        return Result("lost", message=job.failed or f"its keeper ended with status {status}")

    def _close(self, job: _Job) -> None:
        if job.stream is not None:
            self.selector.unregister(job.stream)
            job.stream.close()
            job.stream = None

    def _move(self, job: _Job, events: int) -> None:
        if job.stream is None:
            return
        try:
            if events & selectors.EVENT_WRITE:
                job.unsent = job.unsent[job.stream.send(job.unsent) :]
                if not job.unsent:
                    self.selector.modify(job.stream, selectors.EVENT_READ, job)
            if events & selectors.EVENT_READ:
                while more := job.stream.recv(1 << 18):
                    job.received += more
                    self._read(job)
                self._close(job)
        except BlockingIOError:
            return
        except OSError:
            self._close(job)

    def _read(self, job: _Job) -> None:
        while len(job.received) >= 4:
            (length,) = struct.unpack("!I", job.received[:4])
            if length > _LONGEST:
                raise OSError("a frame is too long")
            if len(job.received) < 4 + length:
                return
            frame = bytes(job.received[4 : 4 + length])
            del job.received[: 4 + length]
            header, _, value = frame.partition(b"\n")
            said: dict[str, Any] = json.loads(header)
            if "failed" in said:
                job.failed = said["failed"]
                continue
            self.results[job.row][said["part"]] = _result(said, value)

    def _give_up(self) -> None:
        """The batch's time is over."""
        self.waiting.clear()
        for number, job in self.running.items():
            with contextlib.suppress(OSError):
                self.server.kill(number)
            self._close(job)
        self.running.clear()


def _asked(part: Part) -> dict[str, Any]:
    if isinstance(part, Call):
        return {"kind": "call", "expression": part.expression}
    if isinstance(part, Feed):
        return {"kind": "feed", "stdin": part.stdin}
    raise TypeError(f"{type(part).__name__} is no part of a program")


def _result(said: dict[str, Any], value: bytes) -> Result:
    if said["status"] != "value":
        return Result(said["status"], message=said["message"])
    try:
        return Result("value", decode(value))
    except NotData as error:
        return Result("data", message=str(error))


def _stop_in(pid: int, servers: list[Server]) -> None:
    if os.getpid() == pid:
        while servers:
            servers.pop().stop()


@functools.cache
def _sandbox(level: str, workers: int) -> Sandbox:
    return Sandbox(level, workers, current_settings().startup_seconds)


def run_programs(
    programs: Sequence[Program], *, limits: Limits | None = None, budget: float | None = None
) -> list[list[Result]]:
    """Runs programs where they can hurt nothing: of each its parts' results, in order."""
    settings = current_settings()
    limits = limits or Limits(seconds=settings.deadline)
    return _sandbox("namespaces", settings.workers).run(programs, limits, budget or settings.budget)
