"""The one thread that decodes, and the requests that wait for it.

Owns what is decoded together. Requests that wait with equal settings become rows of one call of the engine. Each row is
keyed by its request's seed and content, so that it is the same in any company.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rows import Progress
from rl4dlm.serving.fields import Ask, BadRequest
from rl4dlm.serving.texts import Row, rows_of

logger = logging.getLogger(__name__)


class Refused(RuntimeError):
    """The worker takes no request now: it waits for its end, or too many wait already."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Part:
    """A row under way: its first tokens, which will not change any more."""

    row: int
    ids: list[int]


@dataclass(frozen=True)
class Done:
    """All rows of a request."""

    rows: list[Row]


@dataclass(frozen=True)
class Failed:
    """Nothing came of a request: one sentence, and of a task what was raised."""

    message: str
    error: Exception | None = None


@dataclass(frozen=True)
class Made:
    """What came of a task."""

    value: Any


Event = Part | Done | Failed | Made


class Job:
    """A request that waits or is being decoded.

    Args:
        ask: what it asks for. tell: called in the worker's thread with what becomes of it; the last call is with `Done`
            or `Failed`. parts: whether it is told of rows under way.
    """

    def __init__(self, ask: Ask, tell: Callable[[Event], None], *, parts: bool = False) -> None:
        self.ask, self.tell, self.parts = ask, tell, parts
        self.cancelled = False
        """Set by whoever no longer wants it; it is left out if it still waits."""


class Task:
    """Something else that the engine's thread does, alone and in its turn.

    Args:
        do: called with the engine; what it returns becomes `Made`, an exception `Failed` with that exception.
        tell: called in the worker's thread with one of the two.
    """

    def __init__(self, do: Callable[[RolloutEngine], Any], tell: Callable[[Event], None]) -> None:
        self.do, self.tell = do, tell
        self.cancelled = False
        """As `Job`'s."""


class Worker:
    """Decodes requests, in the order in which they came, each with those of equal settings that wait behind it.

    Args:
        engine: decodes; used in this thread only.
        batch_rows: rows decoded at the same time.
        max_waiting: requests that may wait.
        gather: seconds that a request waits for others when the engine is idle.
    """

    def __init__(self, engine: RolloutEngine, *, batch_rows: int, max_waiting: int, gather: float) -> None:
        self.engine, self.batch_rows, self.max_waiting, self.gather = engine, batch_rows, max_waiting, gather
        self.draining = False
        """Set, without a lock, to take no more requests; a signal's handler may."""
        self._waiting: deque[Job | Task] = deque()
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rl4dlm-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job | Task) -> None:
        """Lets a request, or a task, wait. Raises Refused."""
        with self._changed:
            if self.draining or self._closed:
                raise Refused("the server is shutting down and takes no new requests; send them to another one", 503)
            if len(self._waiting) >= self.max_waiting:
                raise Refused(f"{len(self._waiting)} requests wait already, as many as may; try again later", 429)
            self._waiting.append(job)
            self._changed.notify()

    @property
    def unfinished(self) -> int:
        """Requests that wait or are being decoded."""
        with self._changed:
            return len(self._waiting) + self._running

    def close(self) -> None:
        """Ends the thread once nothing waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            jobs = self._next()
            if not jobs:
                return
            if isinstance(jobs, Task):
                self._perform(jobs)
            else:
                self._answer(jobs)
            with self._changed:
                self._running = 0

    def _next(self) -> list[Job] | Task:
        """Requests to decode in one call, or a task; none: the worker is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self.gather
            while self._waiting and not (self._closed or self.draining) and len(self._waiting) < self.batch_rows:
                left = until - time.monotonic()
                if isinstance(self._waiting[0], Task) or left <= 0 or not self._changed.wait(left):
                    break
            taken, rows, kept = list[Job](), 0, deque[Job | Task]()
            task: Task | None = None
            behind = False  # nothing behind a task comes before it
            for job in self._waiting:
                if job.cancelled:
                    job.tell(Failed("the request was given up"))
                elif isinstance(job, Task) and not (behind or taken):
                    task, behind = job, True
                elif behind or isinstance(job, Task):
                    behind = True
                    kept.append(job)
                elif not taken or (job.ask.group == taken[0].ask.group and rows + len(job.ask.keys) <= self.batch_rows):
                    taken.append(job)
                    rows += len(job.ask.keys)
                else:
                    kept.append(job)
            self._waiting, self._running = kept, len(taken) + (task is not None)
            if task is not None:
                return task
            if taken or self._closed:
                return taken
        return self._next()

    def _perform(self, task: Task) -> None:
        try:
            value = task.do(self.engine)
        except Exception as error:
            if not isinstance(error, BadRequest):
                logger.error("a task failed: %s at %s", type(error).__name__, _place(error))
            task.tell(Failed(f"the engine failed with {type(error).__name__}", error))
            return
        task.tell(Made(value))

    def _answer(self, jobs: list[Job]) -> None:
        """Decodes requests; if that fails, each by itself, so that none suffers for another."""
        try:
            found = self._decode(jobs)
        except Exception as error:  # whatever it is, the requests that wait are to be answered
            logger.error("decoding %d requests failed: %s at %s", len(jobs), type(error).__name__, _place(error))
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
            else:
                jobs[0].tell(Failed(f"the engine failed with {type(error).__name__}"))
            return
        for job, rows in zip(jobs, found, strict=True):
            job.tell(Done(rows))

    def _decode(self, jobs: list[Job]) -> list[list[Row]]:
        """The rows of each request. Rows of equal keys, whose requests are equal, are decoded once."""
        places: dict[int, int] = {}
        prompts: list[list[int]] = []
        watched: dict[int, list[tuple[Job, int]]] = {}
        for job in jobs:
            for row, key in enumerate(job.ask.keys):
                if key not in places:
                    places[key] = len(prompts)
                    prompts.append(job.ask.prompts[row // job.ask.n])
                if job.parts:
                    watched.setdefault(places[key], []).append((job, row))
        ask = jobs[0].ask
        watch = Watch(watched, self.engine, ask) if watched else None
        # The keys hold each request's seed.
        rollout = self.engine.generate(
            prompts, ask.config, row_ids=list(places), seed=0, stop=ask.ends, on_step=watch
        )  # fmt: skip
        rows = rows_of(rollout)
        return [[rows[places[key]] for key in job.ask.keys] for job in jobs]


def _place(error: Exception) -> str:
    """Where it happened, and not what the error says, which may hold a request's text."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


class Watch:
    """Tells requests of the blocks of their rows that are finished, after each step."""

    def __init__(self, rows: dict[int, list[tuple[Job, int]]], engine: RolloutEngine, ask: Ask) -> None:
        self.rows = rows
        self.ends = set(engine.spec.eos_token_ids)
        self.monotone = bool(getattr(ask.config.build_schedule(), "monotone", False))
        self.told = dict.fromkeys(rows, 0)

    def __call__(self, progress: Progress) -> None:
        """See `RolloutEngine.generate(on_step=...)`."""
        written = (~progress.masked).long().cumprod(-1).sum(-1)
        columns = (progress.slots, written, progress.start, progress.stop, progress.length)
        for place, (slot, count, start, stop, length) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if slot not in self.rows:
                continue
            # Where tokens may be taken back, those of the active block may be even when all of it is written.
            final = min(stop if self.monotone and count >= stop else start, count, length)
            if final <= self.told[slot]:
                continue
            self.told[slot] = final
            ids = progress.canvas[place, :final].tolist()
            ids = ids[: next((i for i, token in enumerate(ids) if token in self.ends), final)]
            for job, row in self.rows[slot]:
                job.tell(Part(row, ids))
