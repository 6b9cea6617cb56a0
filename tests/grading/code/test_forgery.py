"""Programs earn what they do, and nothing by any other way: sixty honest ones and more than sixty that are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rl4dlm.grading import pool
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.verdicts import Verdict, judge
from tests.grading.code.dishonest import DISHONEST, HANGING, ONE_TEST, PROBLEM
from tests.grading.code.honest import HONEST, Tests

_WORKERS = 4


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pool, "_configured", {"sandbox_workers": _WORKERS})
    yield


def problem_of(tests: Tests) -> str:
    return Problem(
        tuple({"source": test} if isinstance(test, str) else {"call": test[0], "expected": test[1]} for test in tests)
    ).to_json()


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def verdicts(programs: dict[str, str], problem: Problem) -> dict[str, Verdict | None]:
    completions = [fenced(program) for program in programs.values()]
    return dict(zip(programs, judge(completions, [problem] * len(programs)), strict=True))


def test_there_are_sixty_of_each() -> None:
    assert len(HONEST) >= 60 and len(DISHONEST) >= 60


def test_honest_programs_earn_everything() -> None:
    found = judge(
        [fenced(program) for program, _ in HONEST.values()], [problem_of(tests) for _, tests in HONEST.values()]
    )
    less = {name: verdict for name, verdict in zip(HONEST, found, strict=True) if not verdict or verdict.passed != 1}
    assert less == {}
    # All but what compares objects of the program's own is decided from values, outside of its process.
    assert all(test.where == "outside" for verdict in found if verdict for test in verdict.tests)


def test_dishonest_programs_earn_nothing() -> None:
    found = verdicts(DISHONEST, PROBLEM)
    assert {name: verdict for name, verdict in found.items() if verdict is None or verdict.passed != 0} == {}


def test_programs_that_hang_earn_nothing() -> None:
    pool.configure(deadline=1.0)
    found = verdicts(HANGING, ONE_TEST)
    assert {name: verdict for name, verdict in found.items() if verdict is None or verdict.passed != 0} == {}
    late = {name for name, verdict in found.items() if verdict and verdict.tests[0].status == "timeout"}
    assert late >= {"endless_loop", "sleeps", "ignores_signals"}


def test_the_problem_is_one_that_an_honest_program_solves() -> None:
    honest = {"honest": "def f(x):\n    return x * x + 1", "nearly": "def f(x):\n    return 10"}
    found = verdicts(honest, PROBLEM)
    assert [verdict.passed for verdict in found.values() if verdict] == [1.0, 0.2]
    assert {test.where for test in found["honest"].tests} == {"outside", "apart"}  # type: ignore[union-attr]
