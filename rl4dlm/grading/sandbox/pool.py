"""The sandbox's processes as the trainer holds them: started on first use, none left behind.

Owns the server's process and the turns of those who use it. What happens to a batch is in `rl4dlm.grading.sandbox.
batch`. The server is a fresh interpreter that talks over a socket: it is not forked from this process, so that a
sandbox may be used from any thread, beside CUDA, and inside a process that multiprocessing started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl4dlm.grading.sandbox.batch import Batch
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.preload import Preload, environment, find
from rl4dlm.grading.sandbox.programs import Program, Result

_STARTS = 3  # that may fail in a row
_PACKAGE = Path(__file__).resolve().parent
# The server has the standard library alone. The packages above its own are empty there, so that nothing else is loaded.
_BOOT = """
import sys
package = type(sys)
for name, path in zip(("rl4dlm", "rl4dlm.grading", "rl4dlm.grading.sandbox"), sys.argv[3:6]):
    module = sys.modules[name] = package(name)
    module.__path__ = [path]
from rl4dlm.grading.sandbox import server
server.main()
"""


class SandboxError(RuntimeError):
    """There is no sandbox as it was asked for, and nothing was run."""


class PreloadError(SandboxError):
    """What a server shall have beside the standard library could not be imported."""


class _StartError(SandboxError):
    """A server ended or hung before it could say anything: another one may not."""


class Server:
    """The process that forks a keeper for each program, at one level.

    Raises:
        SandboxError: the level is not available here, and why.
    """

    def __init__(self, level: str, startup_seconds: float, preload: Preload) -> None:
        self.level = level
        self._numbers = 0
        self.outbox: deque[tuple[bytes, tuple[socket.socket, ...]]] = deque()
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self.control = ours
        folders = [str(_PACKAGE.parents[1]), str(_PACKAGE.parent), str(_PACKAGE)]
        # -P, -s, -S and an environment of one: as -I, but sets are in the same order every time.
        told = json.dumps(preload._asdict())
        command = [sys.executable, "-P", "-s", "-S", "-B", "-c", _BOOT, str(theirs.fileno()), level, *folders, told]
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={"PYTHONHASHSEED": "0", **environment(preload)},
                    start_new_session=True,
                    cwd="/",
                )
            except OSError as error:  # no processes or memory left for now
                ours.close()
                raise _StartError(f"its server could not be made: {error}") from error
        said: dict[str, Any] = {}
        why = ""
        try:
            ours.settimeout(startup_seconds)
            said = json.loads(ours.recv(65536) or b"{}")
        except OSError:
            why = f"its server did not start in {startup_seconds:g} seconds"
        if "ready" not in said:
            status = self.stop()
            if "failed" in said:
                raise (PreloadError if "preload" in said else SandboxError)(said["failed"])
            raise _StartError(why or f"its server ended with status {status} before it could start")
        ours.setblocking(False)

    def new_number(self) -> int:
        """A fresh number for a keeper."""
        self._numbers += 1
        return self._numbers

    def start(self, number: int, seconds: float, limits: Limits, handles: Sequence[socket.socket]) -> None:
        """Has a keeper forked, which gets the other ends of streams; they are closed here."""
        message = {"start": number, "seconds": seconds, "limits": asdict(limits)}
        self.outbox.append((json.dumps(message).encode(), tuple(handles)))
        self.flush()

    def kill(self, number: int) -> None:
        """Ends a keeper and what it runs."""
        self.outbox.append((json.dumps({"kill": number}).encode(), ()))
        self.flush()

    def flush(self) -> None:
        """Sends what can be sent of the messages to the process, which may lag behind."""
        with contextlib.suppress(BlockingIOError):
            while self.outbox:
                text, handles = self.outbox[0]
                socket.send_fds(self.control, [text], [handle.fileno() for handle in handles])
                self.outbox.popleft()
                for handle in handles:
                    handle.close()

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    def stop(self) -> int:
        """Ends the server and all that it runs; its exit status."""
        for _, handles in self.outbox:
            for handle in handles:
                handle.close()
        self.outbox.clear()
        self.control.close()  # it ends its keepers and itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=1)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        return self.process.wait()


class Sandbox:
    """Runs programs of untrusted source.

    Args:
        level: of `isolation.LEVELS`, or `isolation.LIMITS` for functions of our own.
        workers: programs that run at once.
        startup_seconds: for a server to start; a start that fails is tried again.
        preload: modules that the server imports, as `run_programs` says.
    """

    def __init__(self, level: str, workers: int, startup_seconds: float = 120.0, preload: Sequence[str] = ()) -> None:
        self.level, self.workers, self.startup_seconds = level, workers, startup_seconds
        self.preload = tuple(preload)
        self._adopt_process()

    def run(self, programs: Sequence[Program], limits: Limits, budget: float) -> list[list[Result]]:
        """As `run_programs`. Calls from several threads take turns.

        Raises:
            SandboxError: the level is not available.
        """
        if os.getpid() != self._pid:  # a fork: the server, and perhaps the lock, are the parent's
            self._adopt_process()
        with self._lock:
            try:
                return Batch(self._server, self.workers, programs, limits, budget).run()
            except BaseException:  # also an interrupt: nothing may answer the next batch with this one's results
                _stop_in(self._pid, self._servers)
                raise

    def start(self) -> None:
        """Starts what `run` would start.

        Raises:
            SandboxError: the level is not available.
        """
        if os.getpid() != self._pid:
            self._adopt_process()
        with self._lock:
            self._server()

    def close(self) -> None:
        """Ends all processes. The sandbox may be used again."""
        if os.getpid() == self._pid:
            with self._lock:
                _stop_in(self._pid, self._servers)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._servers: list[Server] = []
        # Runs when the sandbox is garbage and when the interpreter ends.
        weakref.finalize(self, _stop_in, self._pid, self._servers)

    def _server(self) -> Server:
        if self._servers and self._servers[0].has_ended():
            _stop_in(self._pid, self._servers)
        if not self._servers:
            self._servers.append(self._started())
        return self._servers[0]

    def _started(self) -> Server:
        preload = find(self.preload)
        for _ in range(_STARTS - 1):
            with contextlib.suppress(_StartError):
                return Server(self.level, self.startup_seconds, preload)
        return Server(self.level, self.startup_seconds, preload)


def _stop_in(pid: int, servers: list[Server]) -> None:
    if os.getpid() == pid:
        while servers:
            servers.pop().stop()
