"""Shows at the end of a run what was reproduced, what a rule explains and what is not covered."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.conformance import report
from tests.conformance.cases import load_cases


def not_covered() -> dict[str, list[str]]:
    """Reason to names of the cases that are not run."""
    reasons = defaultdict(list)
    for case in load_cases():
        if case.not_covered:
            reasons[case.not_covered].append(case.name)
    return dict(reasons)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not (report.equal or report.explained):
        return
    terminalreporter.section("conformance")
    for line in report.lines(not_covered()):
        terminalreporter.write_line(line)
