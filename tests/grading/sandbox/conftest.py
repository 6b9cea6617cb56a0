"""A sandbox for each level that this machine offers, shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl4dlm.grading.sandbox import levels
from rl4dlm.grading.sandbox.isolation import LEVELS
from rl4dlm.grading.sandbox.pool import Sandbox

ROOT = Path(__file__).resolve().parents[3]


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that they have started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, front = set(), {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return found


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="session", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    reason = levels.why_not(request.param)
    if reason:
        pytest.skip(f"this machine does not offer the level {request.param}: {reason}")
    with Sandbox(request.param, 2) as shared:
        yield shared
