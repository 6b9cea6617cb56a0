"""Which level of the sandbox this machine offers, which one is asked for, and running programs at it.

Owns the rule that nothing is run below the level asked for. A level counts as offered once a server has started at it
and a program there was refused what it must be.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from collections.abc import Sequence

from rl4dlm.grading.pool import SANDBOX_LEVELS, count_work, current_settings
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.pool import Sandbox, SandboxError
from rl4dlm.grading.sandbox.programs import Call, Program, Result

logger = logging.getLogger(__name__)

STRONGEST, *_levels = SANDBOX_LEVELS
LEVELS = tuple(_levels)  # from the strongest on
LIMITS = "limits"  # of which a model's programs know nothing: see `level_for_own`
_SETTING = "sandbox_level"
# What each of them raises shows that a level holds. The first must work.
_TRIED = (
    "sum([20, 22])",
    "open('/etc/passwd').read()",
    "os.listdir('/proc')",
    "__import__('socket').socket()",
    "os.fork()",
    "os.execv('/bin/sh', ['sh'])",
    "os.kill(os.getppid(), 0)",
    "open('/forbidden', 'w')",
)


@functools.cache
def why_not(level: str) -> str:
    """Why this machine does not offer a level; "" if it does. Tried once in a process."""
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    try:
        with Sandbox(level, 1, current_settings().startup_seconds) as sandbox:
            program = Program("import os", tuple(map(Call, _TRIED)))
            (results,) = sandbox.run([program], Limits(seconds=20.0, program_seconds=60.0), 60.0)
    except (SandboxError, OSError) as error:
        return str(error)
    works, *refused = results
    if works != Result("value", 42):
        return f"a program did not run in it: {works.status} {works.message}".rstrip()
    held = [result.status == "error" for result in refused]
    if not all(held):
        return f"it did not refuse {_TRIED[1 + held.index(False)]}"
    return ""


def strongest_level() -> str | None:
    """The strongest level that this machine offers, None if it has none."""
    return next((level for level in LEVELS if not why_not(level)), None)


def active_level() -> str:
    """The level at which programs are run.

    It is the setting `sandbox_level` (`rl4dlm.grading.pool.Settings`): one of `LEVELS`, or `strongest`.

    Raises:
        SandboxError: this machine does not offer it. Nothing is run then.
    """
    wanted = current_settings().sandbox_level
    tried = LEVELS if wanted == STRONGEST else (wanted,)
    for level in tried:
        if not why_not(level):
            return level
    reasons = "; ".join(f"{level}: {why_not(level)}" for level in tried)
    offered = strongest_level() if wanted != STRONGEST else None
    hint = f" It offers {_SETTING}={offered!r}." if offered else " See docs/sandbox.md for what a machine needs."
    raise SandboxError(
        f"{_SETTING}={wanted!r}: programs of a model are run in a sandbox or not at all, and this machine lacks what "
        f"it needs ({reasons}).{hint}"
    )


def level_for_own() -> str:
    """The level at which functions of our own read what a model wrote: one that this machine offers, else `limits`.

    Such a function does not run the text, and so it is not refused where nothing seals it. What it does to the text may
    still be led astray, and then limits alone hold it; the log says so, once.
    """
    wanted = current_settings().sandbox_level
    tried = LEVELS if wanted == STRONGEST else (wanted, *LEVELS)
    level = next((level for level in tried if not why_not(level)), LIMITS)
    announce_own(level, "; ".join(f"{level}: {why_not(level)}" for level in LEVELS) if level == LIMITS else "")
    return level


@functools.cache
def announce_own(level: str, why: str = "") -> None:
    """Says in the log at which level functions of our own read answers, and why at no other."""
    if level == LIMITS:
        logger.warning(
            "answers are compared by processes with limits on memory, time and files and nothing else around them, as "
            "no sandbox can be had for it (%s)",
            why,
        )
    else:
        logger.info("answers are compared in a sandbox at the level %r", level)


def require_sandbox() -> str:
    """Finds out, before anything is trained, that programs can be run, and says at which level: once, in the log.

    Returns:
        The active level.

    Raises:
        SandboxError: they cannot; the message says which setting and what is missing.
    """
    level = active_level()
    _announce(level)
    return level


@functools.cache
def _announce(level: str) -> None:
    logger.info("programs of the model run in a sandbox at the level %r", level)


def share_of_cores() -> int:
    """Programs that run at once: this process's share of the cores, as several ranks may run on one machine."""
    wanted = current_settings().sandbox_workers
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return wanted or max(1, len(os.sched_getaffinity(0)) // ranks)


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    budget: float | None = None,
    preload: Sequence[str] = (),
) -> list[list[Result]]:
    """Runs programs where they can hurt nothing.

    Each part sees the program freshly loaded, in a process of its own. May be called from any thread.

    Args:
        programs: what is run, and what is asked of it.
        limits: of each part; `None` takes the defaults, with `deadline` of `current_settings` for the seconds.
        budget: seconds for all of them, after which what is left has the status `budget`; `None` takes what
            `current_settings` says. Where programs wait for others, what one has not done within a second is put off
            to the end and gets its whole time there, so that few that hang or are slow do not cost the rest their turn;
            what is left at the end of one that has used its share of the budget has the status `timeout`.

        preload: modules beside the standard library that programs may import, such as `("numpy",)`, and with them all
            packages of this environment. They are imported before anything is sealed, so they must be trusted, and
            their folders may be read by programs. Each set of modules has a server of its own.

    Returns:
        For each program a result for each of its parts.

    Raises:
        ValueError: `budget` is not positive and finite.
        SandboxError: a module cannot be imported, or this machine does not offer the level asked for; nothing was run.
    """
    settings = current_settings()
    budget = settings.budget if budget is None else budget
    if not 0 < budget < math.inf:
        raise ValueError(f"budget={budget} seconds; it must be positive and finite")
    level = require_sandbox()
    limits = limits or Limits(seconds=settings.deadline, cpu_seconds=settings.deadline)
    with count_work() as count:
        results = _sandbox(level, share_of_cores(), tuple(preload)).run(programs, limits, budget)
        count.items = sum(map(len, results))
        count.late = sum(result.status in ("timeout", "budget") for row in results for result in row)
    return results


@functools.cache
def _sandbox(level: str, workers: int, preload: tuple[str, ...]) -> Sandbox:
    return Sandbox(level, workers, current_settings().startup_seconds, preload)
