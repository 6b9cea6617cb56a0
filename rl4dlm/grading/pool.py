"""Runs a function on untrusted items in other processes, each item with a deadline.

Owns the worker processes: starting them on first use, handing out items, killing and replacing a worker whose item is
late, and leaving none behind. What a worker does between two messages is in `rl4dlm.grading.worker`.

The processes are fresh interpreters that talk over pipes. They are not forked from this one and do not import its main
module, so a pool may be used from any thread, beside CUDA, inside a process that multiprocessing started, and from a
script without a main guard. POSIX only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_GRACE = 5.0  # seconds beyond its deadline after which a worker that lost its parent ends itself
_CHUNK = 1 << 16
_STARTS = 3  # in a row that may fail before a batch is given up
_REMEMBERED = 4096  # items that were late
_LONGEST_REPLY = 1 << 26
# What a worker sees of this process's environment; keys and tokens are not among it.
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TMPDIR")


class Settings(NamedTuple):
    """How answers are graded; each is also an environment variable, `RL4DLM_REWARD_` and the name in capitals."""

    workers: int = 2  # processes at most
    deadline: float = 5.0  # seconds for an answer
    budget: float = 60.0  # seconds for a batch
    memory_gib: float = 4.0  # address space of a worker
    startup_seconds: float = 120.0  # for a worker to import what it runs
    sandbox_level: str = "strongest"  # that programs run at: see rl4dlm.grading.sandbox
    sandbox_workers: int = 0  # programs that run at once; 0 for this process's share of the cores
    sandbox_backend: str = "local"  # who runs programs: this machine, or a service of the kind `fusion` or `e2b`
    sandbox_url: str = ""  # of a service that runs programs
    sandbox_inside: str = "unscored"  # or "paid": tests that pass where a program could tamper with them


SANDBOX_LEVELS = ("strongest", "namespaces", "landlock")
SANDBOX_BACKENDS = ("local", "fusion", "e2b")
_CHOICES = {
    "sandbox_level": SANDBOX_LEVELS,
    "sandbox_backend": SANDBOX_BACKENDS,
    "sandbox_inside": ("unscored", "paid"),
}

_configured: dict[str, float | str] = {}


def configure(**settings: float | str) -> None:
    """Sets fields of `Settings`; they win over the environment.

    `workers`, `memory_gib` and `startup_seconds` hold for pools that are made later: call this before anything is
    graded.

    Raises:
        ValueError: an unknown setting, or a value out of range.
    """
    for name, value in settings.items():
        if name not in Settings._fields:
            raise ValueError(f"{name}={value!r} is no setting; there are {', '.join(Settings._fields)}")
        _check_setting(name, value)
    _configured.update(settings)


def current_settings() -> Settings:
    """The settings as they are now: those of `configure`, else of the environment, else the defaults.

    Raises:
        ValueError: an environment variable that is not a number where it must be, or out of range.
    """
    values: dict[str, Any] = {}
    for name, default in Settings()._asdict().items():
        variable = f"RL4DLM_REWARD_{name.upper()}"
        text = os.environ.get(variable)
        values[name] = default
        if name in _configured:
            values[name] = _configured[name]
        elif text:
            try:
                values[name] = type(default)(text)
            except ValueError:
                raise ValueError(f"{variable}={text!r}; it must be a number") from None
            _check_setting(variable, values[name])
    return Settings(**values)


def _check_setting(name: str, value: float | str) -> None:
    field = name.lower().removeprefix("rl4dlm_reward_")
    choices = _CHOICES.get(field)
    if choices is not None:
        if value not in choices:
            raise ValueError(f"{name}={value!r}; it must be one of {', '.join(choices)}")
    elif field == "sandbox_url":
        if not isinstance(value, str):
            raise ValueError(f"{name}={value!r}; it must be text")
    elif field.endswith("workers"):
        least = 0 if field == "sandbox_workers" else 1
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name}={value!r}; it must be a whole number from {least}")
    elif isinstance(value, str) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}; it must be positive and finite")


class Usage(NamedTuple):
    """What all pools of this process, and the sandbox, have done so far."""

    items: int = 0
    late: int = 0  # over their deadline or their batch's budget, now or when they were first seen
    seconds: float = 0.0


_usage = Usage()
_counting = threading.Lock()


def usage() -> Usage:
    """Counters for metrics: take the difference of two calls."""
    return _usage


class Work:
    """What a batch has done, for the counters."""

    items = late = 0


@contextlib.contextmanager
def count_work() -> Iterator[Work]:
    """Adds to the counters of `usage` what is written on the result while the block runs, and the time it takes."""
    work, started = Work(), time.monotonic()
    yield work
    _add(work.items, work.late, time.monotonic() - started)


class Outcome(NamedTuple):
    """What became of an item: its `value`, or `error` saying why there is none ("deadline" when it was late)."""

    value: Any
    error: str | None = None


class WorkerPool:
    """A function applied to items in worker processes.

    Args:
        function: "module:name" of a function of one JSON value that returns a JSON value. Workers import it.
        workers: processes at most; each starts when there is an item for it. This and the next two: `None` takes
            what `current_settings` says.
        memory_gib: address space of a worker; an item that needs more fails with `MemoryError`.
        startup_seconds: how long importing the function may take. A start that fails is tried again.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int | None = None,
        memory_gib: float | None = None,
        startup_seconds: float | None = None,
    ) -> None:
        settings = current_settings()
        workers = settings.workers if workers is None else workers
        memory_gib = settings.memory_gib if memory_gib is None else memory_gib
        if ":" not in function:
            raise ValueError(f"function={function!r}; give 'module:name'")
        if workers < 1:
            raise ValueError(f"workers={workers}; at least 1 is needed")
        # A file rather than a module, and -P: what lies in the working directory must not shadow what a worker imports.
        program = str(Path(__file__).with_name("worker.py"))
        self._command = [sys.executable, "-P", program, function, str(int(memory_gib * 2**30))]
        self._limit, self._startup_seconds = workers, startup_seconds or settings.startup_seconds
        self._late: OrderedDict[bytes, float] = OrderedDict()  # hash of an item -> the deadline that it missed
        self._adopt_process()

    def map(self, items: Sequence[Any], *, deadline: float, budget: float | None = None) -> list[Outcome]:
        """`function(item)` for each item, in order. Calls from several threads take turns.

        Args:
            items: JSON values.
            deadline: seconds each item may take, counted from when a worker gets it. An item that was late is
                remembered, and late at once when it comes again with no longer deadline.
            budget: seconds for all of them, counted from when the first worker gets one; what is left then has the
                error "budget". `None` takes what `current_settings` says.

        If workers cannot be started, each of several tries failing, the items have an error that says so.

        Raises:
            ValueError: `deadline` or `budget` is not positive and finite.
            RuntimeError: the workers cannot import the function.
        """
        if not 0 < deadline < math.inf:
            raise ValueError(f"deadline={deadline} seconds; it must be positive and finite")
        budget = current_settings().budget if budget is None else budget
        if not 0 < budget < math.inf:
            raise ValueError(f"budget={budget} seconds; it must be positive and finite")
        if os.getpid() != self._pid:  # a fork: the workers, and perhaps the lock, are the parent's
            self._adopt_process()
        requests = [json.dumps({"item": item, "alarm": deadline + _GRACE}).encode() + b"\n" for item in items]
        with self._lock:
            try:
                with count_work() as work:
                    outcomes = _Batch(self, requests, deadline, budget).run()
                    work.items = len(outcomes)
                    work.late = sum(outcome.error in ("deadline", "budget") for outcome in outcomes)
                return outcomes
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
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # so that it can be killed with whatever it has forked
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        self.unsent, self.received = b"", b""
        self.ready = False
        self.index: int | None = None  # of the item it works on
        self.due = 0.0

    def has_ended(self) -> bool:
        """Whether the process is gone. It is not reaped here: its id must stay its group's until `stop`."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def stop(self) -> int:
        """Kill the process and those it forked, and reap it; its exit status."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status


class _Batch:
    """One call of `map`: which items wait, which worker has which, and what has come back."""

    def __init__(self, pool: WorkerPool, requests: list[bytes], deadline: float, budget: float) -> None:
        self.pool, self.requests, self.deadline, self.budget = pool, requests, deadline, budget
        self.waiting = deque(range(len(requests)))
        self.outcomes: list[Outcome | None] = [None] * len(requests)
        self.keys = [hashlib.sha256(request.rpartition(b'"alarm"')[0]).digest() for request in requests]
        self.end = math.inf  # known once a worker has an item: starting one is not the answers' time
        self.failed_starts = 0

    def run(self) -> list[Outcome]:
        while self.waiting or any(worker.index is not None for worker in self.pool._workers):
            self._hand_out()
            self._wait()
            now = time.monotonic()
            for worker in [worker for worker in self.pool._workers if now >= min(worker.due, self.end)]:
                if worker.index is not None:
                    self._lose(worker, "deadline" if now >= worker.due else "budget")
                elif not worker.ready and now >= worker.due:
                    self._lose(worker, f"did not start in {self.pool._startup_seconds:g} seconds")
            if now >= self.end:
                self._give_up("budget")
        return [outcome for outcome in self.outcomes if outcome is not None]

    def _give_up(self, reason: str) -> None:
        while self.waiting:
            self.outcomes[self.waiting.popleft()] = Outcome(None, reason)

    def _start_failed(self, reason: str, *, is_import: bool = False) -> None:
        self.failed_starts += 1
        if self.failed_starts < _STARTS:
            return
        if is_import:  # the same in every batch to come, so an error of the set-up
            raise RuntimeError(f"a grading worker could not start: {reason}")
        if self.waiting and not any(worker.ready for worker in self.pool._workers):
            warnings.warn(
                f"{len(self.waiting)} answers are not graded: {_STARTS} times in a row a grading worker {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            self._give_up(f"no worker could be started: the last one {reason}")

    def _next(self) -> int | None:
        """The next item that is not known to be late."""
        while self.waiting:
            index = self.waiting.popleft()
            if self.pool._late.get(self.keys[index], 0.0) < self.deadline:
                return index
            self.outcomes[index] = Outcome(None, "deadline")
        return None

    def _hand_out(self) -> None:
        workers = self.pool._workers
        idle = [worker for worker in workers if worker.index is None]
        for worker in idle[:]:
            if worker.ready and worker.has_ended():  # something ended it between two items
                workers.remove(worker)
                idle.remove(worker)
                worker.stop()
        while len(workers) < self.pool._limit and len(idle) < len(self.waiting):
            if self.failed_starts >= _STARTS and workers:
                break  # those that did start do the rest
            try:
                worker = _Worker(self.pool._command)
            except OSError as error:  # no processes or memory left for now
                time.sleep(0.1)
                self._start_failed(f"could not be made: {error}")
                continue
            worker.due = time.monotonic() + self.pool._startup_seconds
            workers.append(worker)
            idle.append(worker)
        for worker in idle:
            if worker.ready and (index := self._next()) is not None:
                worker.index, worker.unsent = index, self.requests[index]
                worker.due = time.monotonic() + self.deadline
                self.end = min(self.end, time.monotonic() + self.budget)

    def _wait(self) -> None:
        busy = [worker for worker in self.pool._workers if worker.index is not None or not worker.ready]
        if not busy or not any(outcome is None for outcome in self.outcomes):
            return
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            nearest = min(self.end, *(worker.due for worker in busy))
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
            try:
                reply = json.loads(worker.received)
            except ValueError:
                reply = None
            worker.received = b""
            if not isinstance(reply, dict):
                self._lose(worker, "wrote something that is no reply")
            elif worker.index is not None:
                self.outcomes[worker.index] = Outcome(reply.get("value"), reply.get("error"))
                worker.index, worker.due = None, math.inf
            elif "error" in reply:
                self._lose(worker, str(reply["error"]), is_import=True)
            else:
                worker.ready, worker.due = True, math.inf
                self.failed_starts = 0
        elif len(worker.received) > _LONGEST_REPLY:
            self._lose(worker, "wrote something that is no reply")

    def _lose(self, worker: _Worker, reason: str | None, *, is_import: bool = False) -> None:
        """A worker that was late or has died takes its item with it; one that had not started is tried again."""
        self.pool._workers.remove(worker)
        status = worker.stop()
        if worker.index is not None:
            self.outcomes[worker.index] = Outcome(None, reason or f"the worker ended with status {status}")
            if reason == "deadline":
                late = self.pool._late
                late[self.keys[worker.index]] = self.deadline
                if len(late) > _REMEMBERED:
                    late.popitem(last=False)
        elif not worker.ready:
            self._start_failed(reason or f"ended with status {status} before it could start", is_import=is_import)


def _add(items: int, late: int, seconds: float) -> None:
    global _usage
    with _counting:
        _usage = Usage(_usage.items + items, _usage.late + late, _usage.seconds + seconds)


def _stop_in(pid: int, workers: list[_Worker]) -> None:
    if os.getpid() == pid:
        while workers:
            workers.pop().stop()
