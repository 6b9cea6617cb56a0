"""Who runs programs: this machine's sandbox, or a service.

Owns the choice, which is the setting `sandbox_backend`, and what a backend is: something with `run_programs`. Whoever
it is, values come back as data and are compared in the trainer's process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rl4dlm.grading.pool import current_settings
from rl4dlm.grading.sandbox import levels
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Program, Result

_REQUESTS = 16  # of a service at once, where the settings do not say how many programs run at once


class Backend(Protocol):
    """What runs programs.

    A part whose fate the backend does not know has the status `lost`: such a part is not scored. A backend raises only
    where it cannot run anything at all.
    """

    def check(self) -> None:
        """Raises RuntimeError, ImportError or ValueError if it cannot run programs, and says what is missing."""

    def run_programs(self, programs: Sequence[Program], *, limits: Limits, budget: float) -> list[list[Result]]:
        """The results of each program's parts, in order, within `budget` seconds."""


class _Local:
    def check(self) -> None:
        levels.require_sandbox()

    def run_programs(self, programs: Sequence[Program], *, limits: Limits, budget: float) -> list[list[Result]]:
        return levels.run_programs(programs, limits=limits, budget=budget)


def backend() -> Backend:
    """The backend of the settings.

    Raises:
        ValueError: a setting that is missing or wrong.
        ImportError: the backend's extra is not installed.
    """
    settings = current_settings()
    if settings.sandbox_backend == "fusion":
        from rl4dlm.grading.sandbox.fusion import Fusion

        return Fusion(settings.sandbox_url, settings.sandbox_workers or _REQUESTS)
    if settings.sandbox_backend == "e2b":
        from rl4dlm.grading.sandbox.e2b import E2B

        return E2B(settings.sandbox_workers or _REQUESTS)
    return _Local()


def require_backend() -> None:
    """Makes sure before anything is trained that programs can be run.

    Raises:
        RuntimeError: this machine offers no sandbox of the level asked for, or the service does not answer.
        ValueError: a setting that is missing or wrong.
        ImportError: the backend's extra is not installed.
    """
    backend().check()


def run_programs(
    programs: Sequence[Program], *, limits: Limits | None = None, budget: float | None = None
) -> list[list[Result]]:
    """Runs programs with the backend of the settings: of each its parts' results, in order.

    Args:
        programs: what to run.
        limits: for each part; by default those of the settings.
        budget: seconds for all of them; by default that of the settings.
    """
    settings = current_settings()
    if not programs:
        return []
    limits = limits or Limits(seconds=settings.deadline, cpu_seconds=settings.deadline)
    return backend().run_programs(programs, limits=limits, budget=budget or settings.budget)
