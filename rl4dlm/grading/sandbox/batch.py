"""One batch of programs on its way through a sandbox: what waits, what runs, what has come back.

Owns the order of things and the deadlines that hold if everything else fails. Programs themselves are never executed
here, nor is what they wrote: answers are decoded as plain data.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rl4dlm.grading.sandbox.data import NotData, decode
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Call, Check, Feed, Part, Program, Result

if TYPE_CHECKING:
    from rl4dlm.grading.sandbox.pool import Server

_GRACE = 2.0  # seconds that a keeper has beyond its program's
_HURRY = 1.0  # seconds that a program gets at first where others wait
_TURN = 2  # times the seconds of a part: what it gets in each of its later turns
_GONE = 1.0  # seconds in which the keeper of a program that its tests say is gone must have ended
_SHARE = 0.95  # of the budget that is there for programs, the rest being the machine's
_LOOK = 3.0  # seconds for looking at the syntax of all sources
_LONGEST = 1 << 26
_SETTLED = ("value", "error", "wrong", "timeout", "memory", "output", "data", "ended", "syntax")
_TESTED, _TESTS = 0, 1  # the two keepers of a check
_MOST_STARTS = 3  # of a server, for a batch
_WORTH_A_LOOK = 8  # programs from which on their syntax is looked at before anything else


@dataclass
class _Run:
    """A keeper, and how far the request to it and the answers from it have got."""

    request: bytes
    number: int = 0
    stream: socket.socket | None = None
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    received: bytearray = field(default_factory=bytearray)
    answers: dict[int, Result] = field(default_factory=dict)
    failed: str = ""
    due: float = 0.0
    late: bool = False
    status: int | None = None  # of the process, once it has ended

    def result(self, place: int) -> Result:
        """Of a part, or why the keeper did not give one. It runs nothing of the program."""
        if place in self.answers:
            return self.answers[place]
        if self.lost():
            return Result("lost", message=self.failed or f"its keeper ended with status {self.status}")
        status = self.status or 0
        if self.late or (status > 0 and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return Result("timeout", message="its processes did not end in time")
        if status > 0 and os.WIFSIGNALED(status):
            return Result("ended", message=f"its keeper ended by signal {os.WTERMSIG(status)}")
        return Result("lost", message=self.failed or f"its keeper ended with status {status}")

    def lost(self) -> bool:
        """Whether the machine failed: there was no keeper, or it ended of itself before it had answered."""
        return self.status is not None and (self.status < 0 or (os.WIFEXITED(self.status) and self.status > 0))


@dataclass
class _Job:
    """Parts of a program that run in one keeper, or one check, in two."""

    row: int
    parts: list[int]
    limits: Limits
    hurried: bool
    inside: bool = False  # a check that runs beside the program
    again: bool = False  # the machine failed before
    rows: list[int] = field(default_factory=list)  # of programs whose syntax is looked at, without a row
    runs: list[_Run] = field(default_factory=list)  # once it starts: what is asked may be large
    begun: float = 0.0

    @property
    def seconds(self) -> float:
        """After which its keepers are ended."""
        return min(self.limits.program_seconds, self.limits.seconds * len(self.parts)) + _GRACE


class Batch:
    """A call of `Sandbox.run`.

    Args:
        server: that forks keepers; starts one where the last has ended.
        workers: jobs that run at once.
        programs: what is to be run.
        limits: of each part.
        budget: seconds for everything.
    """

    def __init__(
        self, server: Callable[[], Server], workers: int, programs: Sequence[Program], limits: Limits, budget: float
    ) -> None:
        self.new_server, self.workers, self.programs = server, workers, programs
        self.limits, self.budget = limits, budget
        self.results: list[list[Result | None]] = [[None] * len(program.parts) for program in programs]
        self.used = [0.0] * len(programs)  # seconds
        self.waiting = deque(job for row in range(len(programs)) for job in self._jobs(row))
        self.running: dict[int, tuple[_Job, _Run]] = {}  # by the number of the keeper
        self.busy = 0  # jobs
        self.starts = 0

    def run(self) -> list[list[Result]]:
        """The results of each program's parts."""
        self.server = self.new_server()
        self.end = time.monotonic() + self.budget
        if len(self.programs) >= _WORTH_A_LOOK:
            self._look_at_syntax()
        while self.waiting or self.busy:
            try:
                with selectors.DefaultSelector() as self.selector:
                    self.selector.register(self.server.control, selectors.EVENT_READ)
                    while self.waiting or self.busy:
                        self._step()
            except ConnectionError:
                self._start_anew()
        # What was not run is a program's own loss where it has used its share of the time.
        share = _SHARE * self.budget * min(1.0, self.workers / max(1, len(self.programs)))
        not_run = (Result("budget"), Result("timeout", message="it has used its share of the batch's time"))
        return [
            [result or not_run[used >= share] for result in row]
            for row, used in zip(self.results, self.used, strict=True)
        ]

    def _step(self) -> None:
        """Starts what may start, and does what has come to be done."""
        looking = any(job.rows for job, _ in self.running.values())
        while self.waiting and self.busy < self.workers and (not looking or self.waiting[0].rows):
            self._start(self._next())
            looking = any(job.rows for job, _ in self.running.values())
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.server.outbox else 0)
        self.selector.modify(self.server.control, wanted)
        nearest = min([self.end, *(run.due for _, run in self.running.values())])
        for key, events in self.selector.select(max(0.0, nearest - time.monotonic())):
            if key.data is None:
                self.server.flush()
                if events & selectors.EVENT_READ:
                    self._heard()
            else:
                self._move(key.data, events)
        now = time.monotonic()
        if now >= self.end:
            self._give_up()
        for _, run in self.running.values():
            if now >= run.due:
                run.late, run.due = True, now + _GRACE
                self.server.kill(run.number)

    def _start_anew(self) -> None:
        """The server has ended, which no program can bring about: what ran starts once more with another one."""
        jobs = {id(job): job for job, _ in self.running.values()}
        for _, run in self.running.values():
            if run.stream is not None:
                run.stream.close()
        self.running.clear()
        self.busy, self.starts = 0, self.starts + 1
        if self.starts >= _MOST_STARTS:
            raise RuntimeError(f"the sandbox's server ended {self.starts} times in one batch; is there enough memory?")
        self.waiting.extendleft(replace(job, runs=[], begun=0.0) for job in reversed(jobs.values()) if not job.rows)
        self.server.stop()  # its end is heard of before it has ended
        self.server = self.new_server()

    def _look_at_syntax(self) -> None:
        """Puts a look at all sources, which takes microseconds for each, before everything else."""
        rows = list(range(len(self.programs)))
        size = -(-len(rows) // self.workers)
        limits = replace(self.limits, seconds=_HURRY, program_seconds=_LOOK, cpu_seconds=_HURRY, timeouts=4)
        for chunk in (rows[start : start + size] for start in range(0, len(rows), size)):
            self.waiting.appendleft(_Job(-1, list(range(len(chunk))), limits, hurried=False, rows=chunk))

    def _jobs(self, row: int) -> list[_Job]:
        """A program's calls and feeds together, and each of its checks."""
        parts = self.programs[row].parts
        together = [place for place, part in enumerate(parts) if not isinstance(part, Check)]
        alone = [[place] for place, part in enumerate(parts) if isinstance(part, Check)]
        return [self._job(row, places, hurried=True) for places in [together, *alone] if places]

    def _job(self, row: int, places: list[int], hurried: bool, inside: bool = False) -> _Job:
        limits = self.limits
        crowded = len(self.programs) > self.workers
        if crowded and hurried:
            timeouts = 1 if limits.seconds > _HURRY else limits.timeouts
            seconds, whole = min(_HURRY, limits.seconds), min(_HURRY, limits.program_seconds)
            limits = replace(limits, seconds=seconds, program_seconds=whole, timeouts=timeouts)
        elif crowded:
            whole = min(max(_TURN * limits.seconds, _HURRY), limits.program_seconds)
            limits = replace(limits, program_seconds=whole)
        return _Job(row, places, limits, crowded and hurried, inside)

    def _next(self) -> _Job:
        """The job that is next. A program that has had its first turn waits until all others have had theirs."""
        for _ in range(len(self.waiting)):
            job = self.waiting.popleft()
            if not job.hurried or self.used[job.row] < _HURRY:
                return job
            self.waiting.append(replace(self._job(job.row, job.parts, False, job.inside), again=job.again))
        return self.waiting.popleft()

    def _runs(self, job: _Job) -> list[_Run]:
        """The keepers of a job, and what is asked of them."""
        if job.rows:
            asked = [{"kind": "compile", "source": self.programs[row].source} for row in job.rows]
            return [_Run(_request(Program("", ()), "", asked, job.limits))]
        program = self.programs[job.row]
        first = program.parts[job.parts[0]]
        if not isinstance(first, Check):
            asked = [_asked(program.parts[place]) for place in job.parts]
            return [_Run(_request(program, program.source, asked, job.limits))]
        job.inside = job.inside or needs_inside(first.source, first.names)
        if job.inside:
            return [_Run(_request(program, program.source, [{"kind": "inside", "tests": first.source}], job.limits))]
        tests = _request(program, first.source, [{"kind": "test", "names": list(first.names)}], job.limits)
        return [_Run(_request(program, program.source, [{"kind": "serve"}], job.limits)), _Run(tests)]

    def _start(self, job: _Job) -> None:
        self.busy += 1
        job.runs, job.begun = self._runs(job), time.monotonic()
        channels = socket.socketpair() if len(job.runs) > 1 else ()
        for side, run in enumerate(job.runs):
            run.number = self.server.new_number()
            run.stream, theirs = socket.socketpair()
            run.stream.setblocking(False)
            run.unsent, run.request = memoryview(run.request), b""
            run.due = time.monotonic() + job.seconds + _GRACE
            self.running[run.number] = (job, run)
            self.selector.register(run.stream, selectors.EVENT_READ | selectors.EVENT_WRITE, run)
            self.server.start(run.number, job.seconds, self.limits, [theirs, *channels[side : side + 1]])

    def _heard(self) -> None:
        """A keeper has ended."""
        text = self.server.control.recv(4096)
        if not text:
            raise ConnectionResetError
        said: dict[str, Any] = json.loads(text)
        job, run = self.running.pop(said.get("ended", -1), (None, None))
        if job is None or run is None:
            return
        self._move(run, selectors.EVENT_READ)
        self._close(run)
        run.status, run.failed = said["status"], run.failed or said.get("why", "")
        if len(job.runs) > 1 and run is job.runs[_TESTS] and job.runs[_TESTED].status is None:
            if run.result(0).status == "gone":  # it is about to say why
                job.runs[_TESTED].due = min(job.runs[_TESTED].due, time.monotonic() + _GONE)
            else:
                self.server.kill(job.runs[_TESTED].number)  # the tests are through with it
        if all(run.status is not None for run in job.runs):
            self.busy -= 1
            self._settle(job)

    def _settle(self, job: _Job) -> None:
        """All keepers of a job have ended: results, or another job."""
        if job.rows:
            self._settle_syntax(job)
            return
        self.used[job.row] += time.monotonic() - job.begun
        late, lost = [], []
        for place, part in enumerate(job.parts):
            result = self._result(job, place)
            if result.status == "inside":
                self.waiting.append(self._job(job.row, [part], job.hurried, inside=True))
                continue
            if result.status == "over":
                if self.used[job.row] < self.limits.program_seconds:
                    late.append(part)
                    continue
                result = result._replace(status="timeout")
            self.results[job.row][part] = result
            if result.status == "timeout" and job.hurried and self.limits.seconds > _HURRY:
                late.append(part)  # what it has stays if the batch's time is over before it gets more
            elif result.status == "lost" and not job.again:
                lost.append(part)
        if late:
            self.waiting.append(self._job(job.row, late, hurried=False, inside=job.inside))
        if lost:
            self.waiting.appendleft(replace(self._job(job.row, lost, job.hurried, job.inside), again=True))

    def _result(self, job: _Job, place: int) -> Result:
        result = job.runs[-1].result(place)
        if len(job.runs) > 1:
            result = self._checked(job, result)
        return result._replace(inside=job.inside)

    def _settle_syntax(self, job: _Job) -> None:
        """Programs that do not compile need not run. If the look itself failed, each is looked at when it runs."""
        answers = job.runs[0].answers
        wrong = {row: answers[place] for place, row in enumerate(job.rows) if place in answers}
        wrong = {row: answer for row, answer in wrong.items() if answer.status == "syntax"}
        for row, answer in wrong.items():
            self.results[row] = [answer for _ in self.results[row]]
        self.waiting = deque(other for other in self.waiting if other.row not in wrong)

    def _checked(self, job: _Job, result: Result) -> Result:
        """The result of tests that ran apart from the program."""
        if result.status == "gone":
            tested = job.runs[_TESTED]
            told = tested.answers.get(0)
            if told is None and tested.lost():
                return tested.result(0)
            ended = Result("ended", message="the process ended before its tests did")
            return told if told is not None and told.status not in ("value", "gone") else ended
        if result.status == "syntax":
            return Result("lost", message=f"the tests do not compile: {result.message}")
        return result

    def _close(self, run: _Run) -> None:
        if run.stream is not None:
            self.selector.unregister(run.stream)
            run.stream.close()
            run.stream = None

    def _move(self, run: _Run, events: int) -> None:
        """Sends and receives what can be."""
        if run.stream is None:
            return
        try:
            if events & selectors.EVENT_WRITE:
                run.unsent = run.unsent[run.stream.send(run.unsent) :]
                if not run.unsent:
                    self.selector.modify(run.stream, selectors.EVENT_READ, run)
            if events & selectors.EVENT_READ:
                while more := run.stream.recv(1 << 18):
                    run.received += more
                    _read(run)
                self._close(run)
        except BlockingIOError:
            return
        except OSError:
            self._close(run)

    def _give_up(self) -> None:
        """The batch's time is over."""
        self.waiting.clear()
        now = time.monotonic()
        for job in {id(job): job for job, _ in self.running.values() if not job.rows}.values():
            self.used[job.row] += now - job.begun
            for run in job.runs:
                self._move(run, selectors.EVENT_READ)
            for place, part in enumerate(job.parts):
                if place in job.runs[-1].answers and (result := self._result(job, place)).status in _SETTLED:
                    self.results[job.row][part] = result
        for _, run in self.running.values():
            with contextlib.suppress(OSError):
                self.server.kill(run.number)
            self._close(run)
        self.running.clear()
        self.busy = 0


@functools.lru_cache(maxsize=4096)
def needs_inside(tests: str, names: tuple[str, ...]) -> bool:
    """Whether tests use a name of the program as only a class of their own process can be used.

    That is as a base class, as an exception to catch, as a type to compare with, or for its attributes. It is
    decided by the tests alone, which a program cannot change.
    """
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # which the keeper will say
    found: set[str] = set()
    for node in ast.walk(tree):
        used: list[ast.AST | None] = []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and not node.value.id.isupper():
            used = [node.value]  # a member of an enumeration, a static method
        elif isinstance(node, ast.ExceptHandler):
            used = [node.type]
        elif isinstance(node, ast.ClassDef):
            used = list(node.bases)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("isinstance", "issubclass", "raises", "assertRaises", "assertIsInstance", "type", "hasattr"):
                used = list(node.args)
        for part in used:
            # A call among them gives a value, which is data or stands for an object.
            if isinstance(part, ast.Name | ast.Tuple | ast.Attribute):
                found |= {child.id for child in ast.walk(part) if isinstance(child, ast.Name)}
    return bool(found & set(names))


def _read(run: _Run) -> None:
    while len(run.received) >= 4:
        (length,) = struct.unpack("!I", run.received[:4])
        if length > _LONGEST:
            raise OSError("a message is too long")
        if len(run.received) < 4 + length:
            return
        frame = bytes(run.received[4 : 4 + length])
        del run.received[: 4 + length]
        header, _, value = frame.partition(b"\n")
        said: dict[str, Any] = json.loads(header)
        if "failed" in said:
            run.failed = said["failed"]
        else:
            run.answers[said["part"]] = _result(said, value)


def _result(said: dict[str, Any], value: bytes) -> Result:
    if said["status"] != "value":
        return Result(said["status"], message=said["message"])
    try:
        return Result("value", decode(value))
    except NotData as error:
        return Result("data", message=str(error))


def _request(program: Program, source: str, asked: list[dict[str, Any]], limits: Limits) -> bytes:
    request = {"source": source, "setup": program.setup, "parts": asked, "limits": asdict(limits)}
    text = json.dumps(request).encode()
    return struct.pack("!I", len(text)) + text


def _asked(part: Part) -> dict[str, Any]:
    if isinstance(part, Call):
        return {"kind": "call", "expression": part.expression}
    if isinstance(part, Feed):
        return {"kind": "feed", "stdin": part.stdin}
    raise TypeError(f"{type(part).__name__} is no part of a program")
