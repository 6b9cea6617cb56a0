"""The process behind the sandbox: forks a keeper for each program, and never sees a program itself.

Owns the server's loop. It is a fresh interpreter with the standard library, what is preloaded, and no
environment. What a program
says, and what it is asked, goes from the trainer to the keeper over a stream that the server hands on unread: a later
program finds nothing of an earlier one in the memory that it was forked from.

Messages on the control socket are JSON. To the server: `{"start": id, "seconds": s}` with one or two streams, `{"kill":
id}`. From it: `{"ready": level}` or `{"failed": reason}` once, then `{"ended": id, "status": s, "cpu": seconds}`.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import contextlib
import gc
import importlib
import json
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

from rl4dlm.grading.sandbox import isolation, job, kernel, preload
from rl4dlm.grading.sandbox.frames import write_frame
from rl4dlm.grading.sandbox.preload import Preload

# What programs most often import is there when they are forked. Each module makes every fork dearer, so that what few
# import is left to them.
PRELOADED = (
    "bisect", "cmath", "collections", "contextlib", "copy", "functools", "heapq", "itertools", "json", "math",
    "operator", "random", "re", "string", "time", "typing",
)  # fmt: skip
# These load shared libraries, which are out of reach later.
LOADED = ("_bz2", "_decimal", "_hashlib", "_lzma", "zlib")
_ALONE = 1.0  # seconds between two looks at whether the parent lives


def main() -> None:
    """Serves until the control socket closes, or the parent is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    level, parent, preloaded = sys.argv[2], os.getppid(), Preload(**json.loads(sys.argv[6]))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))
    for name in (*PRELOADED, *LOADED):
        with contextlib.suppress(ImportError):  # Python may have been built without one
            importlib.import_module(name)
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")  # which Python without its site module lacks
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory is short, programs go before what trains
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reason = preload.load(preloaded)
    if reason:
        control.send(json.dumps({"failed": reason, "preload": True}).encode())
        return
    os.environ.clear()
    try:
        prepared = isolation.prepare_server(level, tuple(preloaded.paths))
    except OSError as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    sys.path[:] = [path for path in sys.path if os.path.isdir(path)]
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": level}).encode())
    _Server(control, prepared, parent).run()


class _Server:
    """Which keepers run, and until when."""

    def __init__(self, control: socket.socket, prepared: isolation.Prepared, parent: int) -> None:
        self.control, self.prepared, self.parent = control, prepared, parent
        self.keepers: dict[int, _Keeper] = {}  # by the id of the process
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serves."""
        with self.selector:
            self.selector.register(self.control, selectors.EVENT_READ)
            while os.getppid() == self.parent:
                nearest = min([_ALONE, *(keeper.due - time.monotonic() for keeper in self.keepers.values())])
                unseen = [pid for pid, keeper in self.keepers.items() if keeper.handle < 0]
                if unseen:
                    nearest = min(nearest, kernel.LOOK)
                ready = [key.data for key, _ in self.selector.select(max(0.0, nearest))]
                for pid in [*filter(None, ready), *filter(kernel.has_ended, unseen)]:
                    self._reap(pid)
                if None in ready and not self._obey():
                    break
                now = time.monotonic()
                for keeper in self.keepers.values():
                    if now >= keeper.due:
                        os.kill(keeper.pid, signal.SIGKILL)
                        keeper.due = math.inf
        for keeper in self.keepers.values():
            os.kill(keeper.pid, signal.SIGKILL)

    def _obey(self) -> bool:
        """One message; False when there will be no more."""
        text, handles, _, _ = socket.recv_fds(self.control, 4096, 2)
        if not text:
            return False
        message: dict[str, Any] = json.loads(text)
        if "start" in message:
            self._start(message, handles)
            for handle in handles:
                os.close(handle)
        else:
            for keeper in self.keepers.values():
                if keeper.number == message["kill"]:
                    os.kill(keeper.pid, signal.SIGKILL)
        return True

    def _start(self, message: dict[str, Any], handles: list[int]) -> None:
        number = message["start"]
        try:
            pid = isolation.fork_keeper(self.prepared)
        except OSError as error:  # the machine's fault, not the program's
            self._say(ended=number, status=-1, cpu=0.0, why=str(error))
            return
        if pid == 0:
            self._keep(message, handles)
        handle = kernel.process_handle(pid)
        if handle >= 0:
            self.selector.register(handle, selectors.EVENT_READ, pid)
        self.keepers[pid] = _Keeper(pid, handle, number, time.monotonic() + message["seconds"])

    def _keep(self, message: dict[str, Any], handles: list[int]) -> None:
        """The keeper, which ends here."""
        status = 71
        try:
            parent = 0 if self.prepared.level == isolation.NAMESPACES else os.getppid()
            self.control.close()
            self.selector.close()
            for keeper in self.keepers.values():
                if keeper.handle >= 0:
                    os.close(keeper.handle)
            isolation.die_with_parent(parent)
            isolation.prepare_keeper(self.prepared, cast(Any, SimpleNamespace(**message["limits"])))
            job.serve(handles[0], handles[1] if len(handles) > 1 else -1, self.prepared)
            status = 0
        except BaseException as error:
            write_frame(handles[0], json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(status)

    def _reap(self, pid: int) -> None:
        keeper = self.keepers.pop(pid)
        if keeper.handle >= 0:
            self.selector.unregister(keeper.handle)
            os.close(keeper.handle)
        _, status, used = os.wait4(keeper.pid, 0)
        self._say(ended=keeper.number, status=status, cpu=used.ru_utime + used.ru_stime)

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # no one listens any more: the next look at the parent ends this
            self.control.send(json.dumps(message).encode())


class _Keeper:
    def __init__(self, pid: int, handle: int, number: int, due: float) -> None:
        self.pid, self.handle, self.number, self.due = pid, handle, number, due
