"""Runs a function on untrusted items in other processes, each item with a deadline.

Owns the worker processes: starting them on first use, handing out items, killing and replacing a worker whose item is
late, and leaving none behind. What a worker does between two messages is in `rl4dlm.grading.worker`.

The processes are fresh interpreters that talk over pipes. They are not forked from this one and do not import its main
module, so a pool may be used from any thread, beside CUDA, inside a process that multiprocessing started, and from a
script without a main guard. POSIX only.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_GRACE = 5.0  # seconds beyond its deadline after which a worker that lost its parent ends itself
_CHUNK = 1 << 16


class Outcome(NamedTuple):
    """What became of an item: its `value`, or `error` saying why there is none ("deadline" when it was late)."""

    value: Any
    error: str | None = None


class WorkerPool:
    """A function applied to items in worker processes.

    Args:
        function: "module:name" of a function of one JSON value that returns a JSON value. Workers import it.
        workers: processes at most; each starts when there is an item for it.
        memory_gib: address space of a worker; an item that needs more fails with `MemoryError`.
        startup_seconds: how long importing the function may take.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, function: str, *, workers: int = 2, memory_gib: float = 4.0, startup_seconds: float = 120.0
    ) -> None:
        if ":" not in function:
            raise ValueError(f"function={function!r}; give 'module:name'")
        if workers < 1:
            raise ValueError(f"workers={workers}; at least 1 is needed")
        # A file rather than a module, and -P: what lies in the working directory must not shadow what a worker imports.
        program = str(Path(__file__).with_name("worker.py"))
        self._command = [sys.executable, "-P", program, function, str(int(memory_gib * 2**30))]
        self._limit, self._startup_seconds = workers, startup_seconds
        self._adopt_process()

    def map(self, items: Sequence[Any], *, deadline: float) -> list[Outcome]:
        """`function(item)` for each item, in order. Calls from several threads take turns.

        Args:
            items: JSON values.
            deadline: seconds each item may take, counted from when a worker gets it.

        Raises:
            ValueError: `deadline` is not positive and finite.
            RuntimeError: the workers cannot import the function.
        """
        if not 0 < deadline < math.inf:
            raise ValueError(f"deadline={deadline} seconds; it must be positive and finite")
        if os.getpid() != self._pid:  # a fork: the workers, and perhaps the lock, are the parent's
            self._adopt_process()
        requests = [json.dumps({"item": item, "alarm": deadline + _GRACE}).encode() + b"\n" for item in items]
        with self._lock:
            try:
                return _Batch(self, requests, deadline).run()
            except BaseException:  # also an interrupt: no worker may answer the next batch with this one's results
                self._stop_all()
                raise

    def close(self) -> None:
        """End all workers. The pool may be used again."""
        if os.getpid() == self._pid:
            with self._lock:
                self._stop_all()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        # Runs when the pool is garbage and when the interpreter ends.
        weakref.finalize(self, _stop_in, self._pid, self._workers)

    def _stop_all(self) -> None:
        _stop_in(self._pid, self._workers)


class _Worker:
    """One process, and how far the message to it and the reply from it have got."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        self.unsent, self.received = b"", b""
        self.ready = False
        self.index: int | None = None  # of the item it works on
        self.due = 0.0

    def stop(self) -> int:
        """Kill and reap the process; its exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status


class _Batch:
    """One call of `map`: which items wait, which worker has which, and what has come back."""

    def __init__(self, pool: WorkerPool, requests: list[bytes], deadline: float) -> None:
        self.pool, self.requests, self.deadline = pool, requests, deadline
        self.waiting = deque(range(len(requests)))
        self.outcomes: list[Outcome | None] = [None] * len(requests)

    def run(self) -> list[Outcome]:
        while self.waiting or any(worker.index is not None for worker in self.pool._workers):
            self._hand_out()
            self._wait()
            for worker in [worker for worker in self.pool._workers if time.monotonic() >= worker.due]:
                if not worker.ready:
                    raise RuntimeError(f"a grading worker did not start in {self.pool._startup_seconds:g} seconds")
                if worker.index is not None:
                    self._lose(worker, "deadline")
        return [outcome for outcome in self.outcomes if outcome is not None]

    def _hand_out(self) -> None:
        workers = self.pool._workers
        idle = [worker for worker in workers if worker.index is None]
        for worker in idle[:]:
            if worker.ready and worker.process.poll() is not None:  # something ended it between two items
                workers.remove(worker)
                idle.remove(worker)
                worker.stop()
        while len(workers) < self.pool._limit and len(idle) < len(self.waiting):
            worker = _Worker(self.pool._command)
            worker.due = time.monotonic() + self.pool._startup_seconds
            workers.append(worker)
            idle.append(worker)
        for worker in idle:
            if worker.ready and self.waiting:
                worker.index = self.waiting.popleft()
                worker.unsent = self.requests[worker.index]
                worker.due = time.monotonic() + self.deadline

    def _wait(self) -> None:
        busy = [worker for worker in self.pool._workers if worker.index is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            nearest = min((worker.due for worker in busy), default=0.0)
            for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                if key.data not in self.pool._workers:
                    continue  # lost to an earlier event of this round
                if key.fd == key.data.stdin:
                    self._send(key.data)
                else:
                    self._receive(key.data)

    def _send(self, worker: _Worker) -> None:
        try:
            worker.unsent = worker.unsent[os.write(worker.stdin, worker.unsent[:_CHUNK]) :]
        except BrokenPipeError:
            worker.unsent = b""  # the process is gone, which the other pipe tells too

    def _receive(self, worker: _Worker) -> None:
        data = os.read(worker.stdout, _CHUNK)
        worker.received += data
        if not data:
            self._lose(worker, None)
        elif worker.received.endswith(b"\n"):
            reply, worker.received = json.loads(worker.received), b""
            if worker.index is not None:
                self.outcomes[worker.index] = Outcome(reply.get("value"), reply.get("error"))
                worker.index = None
            elif "error" in reply:
                raise RuntimeError(f"a grading worker could not start: {reply['error']}")
            worker.ready, worker.due = True, float("inf")

    def _lose(self, worker: _Worker, reason: str | None) -> None:
        """A worker that was late or has died takes its item with it."""
        self.pool._workers.remove(worker)
        status = worker.stop()
        if worker.index is not None:
            self.outcomes[worker.index] = Outcome(None, reason or f"the worker ended with status {status}")
        elif not worker.ready:
            raise RuntimeError(f"a grading worker ended with status {status} before it could start")


def _stop_in(pid: int, workers: list[_Worker]) -> None:
    if os.getpid() == pid:
        while workers:
            workers.pop().stop()
