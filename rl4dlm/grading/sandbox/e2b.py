"""Programs run in the cloud of E2B, whose package `e2b-code-interpreter` is an extra.

Owns the calls of that package. Each script is a command in a sandbox of its own, which is made for it and ended with
it, so that no program meets what another has left behind. The account's key is in the environment variable
`E2B_API_KEY`, which the package reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from rl4dlm._optional import require
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Program, Result
from rl4dlm.grading.sandbox.services import Answer, LostError, Script, as_text, run_all

_GRACE = 10.0  # seconds beyond a program's for the service to answer
_SCRIPT, _STDIN = "/tmp/program.py", "/tmp/stdin"


class E2B:
    """Sandboxes of E2B.

    Args:
        workers: sandboxes at once.

    Raises:
        ImportError: the extra is not installed.
    """

    def __init__(self, workers: int) -> None:
        self.package: Any = require("e2b_code_interpreter", extra="e2b", purpose="sandbox_backend='e2b'")
        self.workers = workers

    def check(self) -> None:
        """As `Backend.check`: runs a script of one line."""
        try:
            answer = self.send(Script("print(6 * 7)", None, ""), Limits())
        except LostError as error:
            raise RuntimeError(f"no programs can be run: {error}") from error
        if answer.stdout.strip() != "42":
            raise RuntimeError(f"no programs can be run: E2B answers, but print(6 * 7) gave {answer}")

    def run_programs(self, programs: Sequence[Program], *, limits: Limits, budget: float) -> list[list[Result]]:
        """As `Backend.run_programs`."""
        return run_all(programs, self.send, workers=self.workers, limits=limits, budget=budget)

    def send(self, sent: Script, limits: Limits) -> Answer:
        """Has one script run.

        Raises:
            LostError: E2B did not run it.
        """
        sandbox: Any = None
        try:
            sandbox = self.package.Sandbox.create(timeout=int(limits.seconds + 2 * _GRACE))
            sandbox.files.write(_SCRIPT, sent.source)
            sandbox.files.write(_STDIN, sent.stdin or "")
            # `timeout` ends the program, so that a service that is slow to answer is told apart from a program that is.
            command = f"timeout -s KILL {limits.seconds:g} python3 {_SCRIPT} < {_STDIN}"
            try:
                done = sandbox.commands.run(command, timeout=limits.seconds + _GRACE)
            except Exception as error:
                if not hasattr(error, "exit_code"):
                    raise
                done = error  # the package raises where the status is not 0
            return Answer(
                finished=done.exit_code not in (124, 137),
                exit_status=int(done.exit_code),
                stdout=as_text(done.stdout),
                stderr=as_text(done.stderr),
            )
        except Exception as error:  # of the package or of the network; which ones differs from version to version
            raise LostError(f"E2B: {type(error).__name__}: {error}") from error
        finally:
            if sandbox is not None:
                with contextlib.suppress(Exception):
                    sandbox.kill()
