"""What all tasks of code share: programs are judged by running them, many at a time.

Owns the way from completions to verdicts. What a program has to do is in the column `problem`, see
`rl4dlm.grading.code.problem`; how it is run and judged is `rl4dlm.grading.code.verdicts`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl4dlm.grading.code.verdicts import judge
from rl4dlm.grading.sandbox.backends import require_backend
from rl4dlm.tasks.base import Task, share


class CodeTask(Task):
    """A task with the column `problem`. A completion solves a row if its program passes all tests."""

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the completion's program passes all tests; `None` where that cannot be told."""
        return self.check_many([completion], [row])[0]

    def require(self) -> None:
        """Raises if programs cannot be run, see `rl4dlm.grading.sandbox.backends.require_backend`."""
        require_backend()

    def check_many(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """`check` for each pair, all in one batch of the sandbox."""
        return [None if passed is None else passed == 1 for passed in self.passed(completions, rows)]

    def metrics(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """`solved`, and `tests_passed`: the mean share of tests that a program passes."""
        return self.measured(completions, rows)[1]

    def measured(
        self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[bool | None], dict[str, float]]:
        """Verdicts and metrics of one run of the programs."""
        shares = self.passed(completions, rows)
        judged = [passed for passed in shares if passed is not None]
        metrics = {
            "solved": share(sum(passed == 1 for passed in judged), len(judged)),
            "tests_passed": share(sum(judged), len(judged)),
        }
        return [None if passed is None else passed == 1 for passed in shares], metrics

    def passed(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The share of tests that each completion's program passes; `None` where it cannot be judged."""
        verdicts = judge(completions, [row.get("problem") for row in rows])
        return [None if verdict is None else verdict.passed for verdict in verdicts]
