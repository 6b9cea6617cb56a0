"""How grading outside the trainer's process is set up, and what it has done: settings and counters.

Owns both for everything that runs there: comparisons of answers (`rl4dlm.grading.workers`) and programs
(`rl4dlm.grading.sandbox`).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """How answers are graded; each is also an environment variable, `RL4DLM_REWARD_` and the name in capitals."""

    workers: int = 2  # answers that are compared at once
    deadline: float = 5.0  # seconds for an answer
    budget: float = 60.0  # seconds for a batch
    memory_gib: float = 4.0  # address space of a comparison
    startup_seconds: float = 120.0  # for a server to import what it runs
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
    """What this process has had compared and run so far."""

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


def _add(items: int, late: int, seconds: float) -> None:
    global _usage
    with _counting:
        _usage = Usage(_usage.items + items, _usage.late + late, _usage.seconds + seconds)
