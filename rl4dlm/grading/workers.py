"""Applies a function of ours to untrusted items outside this process, each item with a deadline.

Owns which items are asked together and when, and what a late one costs. The processes, their limits and what seals them
are the sandbox's (`rl4dlm.grading.sandbox`), whose server imports the function once: an item is data that goes in, what
the function returns is data that comes out, and a process that has hung is killed. A pool may be used from any thread,
beside CUDA, and inside a process that multiprocessing started.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from rl4dlm.grading.pool import count_work, current_settings
from rl4dlm.grading.sandbox import levels
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.pool import PreloadError, Sandbox, SandboxError
from rl4dlm.grading.sandbox.programs import OWN_TIME, Call, Program, Result

logger = logging.getLogger(__name__)

_FIRST_TURN = 1.0  # seconds that an item gets before all others have had theirs
_WORTH = 6  # items of the first turn that pay for one process more: what is preloaded makes forking it dear
_REMEMBERED = 4096  # items that were late
_ANSWERS = 8 << 20  # bytes
_PROGRAM = """
import json
from {module} import {name} as function
def apply(text):
    return function(json.loads(text))
"""


class Outcome(NamedTuple):
    """What became of an item.

    Attributes:
        value: what the function returned.
        error: why there is no value: "deadline" when it was late, "budget" when the batch's time went to others, else
            what the function raised or what happened to its process.
        lost: whether nothing can be said of the item, since it was not looked at.
    """

    value: Any
    error: str | None = None
    lost: bool = False


class WorkerPool:
    """A function applied to items in processes of the sandbox.

    Args:
        function: "module:name" of a function of one JSON value that returns plain data, for a server to import.
        workers: items at once; None takes what `current_settings` says, as for the next two.
        memory_gib: address space for an item; one that needs more fails with `MemoryError`.
        startup_seconds: how long importing the function may take. A start that fails is tried again.
        preload: packages that the function needs and that may lie elsewhere than this environment's others.
        sealed: whether the function evaluates what it is given, so that it is refused where there is no sandbox.

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
        preload: Sequence[str] = (),
        sealed: bool = False,
    ) -> None:
        settings = current_settings()
        self.workers = settings.workers if workers is None else workers
        memory_gib = settings.memory_gib if memory_gib is None else memory_gib
        module, colon, name = function.partition(":")
        if not colon:
            raise ValueError(f"function={function!r}; give 'module:name'")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}; at least 1 is needed")
        self.sealed, self.preload = sealed, (*preload, function)
        self.function, self.memory_bytes = function, int(memory_gib * 2**30)
        self._setup = _PROGRAM.format(module=module, name=name)
        self._startup_seconds = startup_seconds or settings.startup_seconds
        self._late: OrderedDict[bytes, float] = OrderedDict()  # hash of an item -> the deadline that it missed
        self._sandboxes: dict[str, Sandbox] = {}  # by level
        self._lacking = False  # whether the function cannot be had at the level that the machine offers

    def map(self, items: Sequence[Any], *, deadline: float, budget: float | None = None) -> list[Outcome]:
        """`function(item)` for each item, in order. Equal items are asked once. Calls from several threads take turns.

        An item that needs longer than a second is put off until all others have had that, and is then given its whole
        time.

        Args:
            items: JSON values.
            deadline: seconds each item may take. An item that was late is remembered, and late at once when it comes
                again with no longer deadline.
            budget: seconds for all of them, counted from when there is a server; what is left then has the error
                "budget". `None` takes what `current_settings` says.

        If no server can be started, each of several tries failing, the items have an error that says so.

        Raises:
            ValueError: `deadline` or `budget` is not positive and finite.
            RuntimeError: the function cannot be imported, or it must be sealed and this machine has no sandbox.
        """
        if not 0 < deadline < math.inf:
            raise ValueError(f"deadline={deadline} seconds; it must be positive and finite")
        budget = current_settings().budget if budget is None else budget
        if not 0 < budget < math.inf:
            raise ValueError(f"budget={budget} seconds; it must be positive and finite")
        texts = [json.dumps(item) for item in items]
        with count_work() as work:
            late = {text: Outcome(None, "deadline") for text in texts if self._late.get(_key(text), 0.0) >= deadline}
            asked = list(dict.fromkeys(text for text in texts if text not in late))
            found = late | (self._ask(asked, deadline, budget) if asked else {})
            outcomes = [found[text] for text in texts]
            work.items = len(outcomes)
            work.late = sum(outcome.error in ("deadline", "budget") for outcome in outcomes)
        return outcomes

    def require(self) -> None:
        """Starts a server now, so that what is missing is said before anything is trained.

        Raises:
            RuntimeError: as `map`.
        """
        self._started()

    def close(self) -> None:
        """Ends all processes. The pool may be used again."""
        for sandbox in self._sandboxes.values():
            sandbox.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, texts: list[str], deadline: float, budget: float) -> dict[str, Outcome]:
        try:
            sandbox = self._started()
        except SandboxError as error:
            if self.sealed or isinstance(error, PreloadError):  # an error of the set-up, in every batch
                raise
            warnings.warn(f"{len(texts)} answers are not graded: {error}", RuntimeWarning, stacklevel=3)
            return dict.fromkeys(texts, Outcome(None, f"no server could be started: {error}", lost=True))
        end, found = time.monotonic() + budget, dict.fromkeys(texts, Outcome(None, "budget", lost=True))
        for seconds in (_FIRST_TURN, deadline) if deadline > _FIRST_TURN else (deadline,):
            left = end - time.monotonic()
            if not texts or left <= 0:
                break
            results = self._run(sandbox, texts, seconds, left)
            again = [text for text, result in results.items() if result.status in ("timeout", "budget")]
            found |= {text: _outcome(result) for text, result in results.items() if text not in again}
            if seconds == deadline:
                for text in again:
                    if results[text].message.startswith(OWN_TIME):
                        found[text] = Outcome(None, "deadline")
                        self._remember(text, deadline)
            texts = again
        return found

    def _run(self, sandbox: Sandbox, texts: list[str], seconds: float, budget: float) -> dict[str, Result]:
        """One turn of each item. A process goes on with the next item until it is late."""
        least = _WORTH if seconds <= _FIRST_TURN else 1  # those of the second turn are slow
        count = min(self.workers, -(-len(texts) // least))
        shares = [texts[first::count] for first in range(count)]
        programs = [Program("", tuple(Call(f"apply({text!r})") for text in share), self._setup) for share in shares]
        limits = Limits(
            seconds=seconds,
            program_seconds=budget,
            timeouts=len(texts) + 1,
            cpu_seconds=seconds,
            memory_bytes=self.memory_bytes,
            file_bytes=2 * _ANSWERS,
            output_bytes=_ANSWERS,
        )
        rows = sandbox.run(programs, limits, budget)
        return {
            text: result
            for share, row in zip(shares, rows, strict=True)
            for text, result in zip(share, row, strict=True)
        }

    def _started(self) -> Sandbox:
        """The sandbox at the level that there is for the function, with a server."""
        if self.sealed:
            level = levels.require_sandbox()
        else:
            level = levels.LIMITS if self._lacking else levels.level_for_own()
        if level not in self._sandboxes:  # in one step: of two threads both must get the one that `close` knows
            self._sandboxes.setdefault(level, Sandbox(level, self.workers, self._startup_seconds, self.preload))
        try:
            self._sandboxes[level].start()
        except SandboxError as error:
            if self.sealed or level == levels.LIMITS or isinstance(error, PreloadError):
                raise
            self._lacking = True
            levels.announce_own(levels.LIMITS, f"{level}: {error}")
            return self._started()
        return self._sandboxes[level]

    def _remember(self, text: str, deadline: float) -> None:
        self._late[_key(text)] = deadline
        if len(self._late) > _REMEMBERED:
            self._late.popitem(last=False)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _outcome(result: Result) -> Outcome:
    if result.status == "value":
        return Outcome(result.value)
    if result.status == "memory":
        return Outcome(None, f"MemoryError: {result.message}")
    return Outcome(None, result.message or result.status, lost=result.status == "lost")
