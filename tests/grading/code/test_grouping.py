"""Calls that share a process have the results that they would have alone."""

from __future__ import annotations

import pytest

from rl4dlm.grading import pool
from rl4dlm.grading.code.grouping import run_in_groups
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.verdicts import judge
from rl4dlm.grading.sandbox.programs import Call, Feed, Program, Result


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_configured", {"sandbox_workers": 4, "deadline": 2.0})


def many(number: int = 100) -> Problem:
    return Problem(tuple({"call": f"f({n})  # {n}", "expected": str(n * n)} for n in range(number)), entry_point="f")


PROGRAMS = {
    "right": ("def f(n):\n    return n * n", 1.0),
    "wrong": ("def f(n):\n    return -1", 0.0),
    "raises_at_some": ("def f(n):\n    if n % 10 == 3:\n        raise ValueError(n)\n    return n * n", 0.9),
    "ends_at_one": ("import os\ndef f(n):\n    if n == 40:\n        os._exit(0)\n    return n * n", 0.99),
    "no_data_at_one": ("def f(n):\n    return object() if n == 40 else n * n", 0.99),
    "hangs_at_one": ("def f(n):\n    while n == 40:\n        pass\n    return n * n", 0.99),
    "same_list": ("class Same(list):\n    pass\nsame = [0]\ndef g(n):\n    same[0] = n\n    return same\ndef f(n):\n"
                  "    return g(n)[0] ** 2", 1.0),
    "exits": ("import sys\ndef f(n):\n    sys.exit(0)", 0.0),
    "replaces_the_helper": ("def _each_of(calls):\n    return [(True, 4)] * len(calls)\ndef f(n):\n    return 1", 0.01),
    "does_not_load": ("raise ValueError", 0.0),
}  # fmt: skip


def test_many_tests_give_the_shares_that_few_give() -> None:
    found = judge(
        [""] * len(PROGRAMS), [many()] * len(PROGRAMS), programs=[program for program, _ in PROGRAMS.values()]
    )
    shares = {name: verdict.passed for name, verdict in zip(PROGRAMS, found, strict=True) if verdict}
    assert shares == {name: pytest.approx(share) for name, (_, share) in PROGRAMS.items()}


def test_what_is_run_for_many_and_for_few() -> None:
    asked: list[list[Program]] = []

    def run(programs: list[Program]) -> list[list[Result]]:
        asked.append(programs)
        return [[Result("timeout") for _ in program.parts] for program in programs]

    few = Program("few", tuple(Call(f"f({n})") for n in range(60)))
    some = Program("some", (*(Call(f"f({n})") for n in range(100)), Feed("1"), Call("f(0)")))
    all_hang = Program("all_hang", tuple(Call(f"f({n})") for n in range(400)))
    results = run_in_groups([few, some, all_hang], run)
    assert [len(row) for row in results] == [60, 102, 400]
    assert {result.status for row in results for result in row} == {"timeout"}
    first, second = asked
    assert [len(program.parts) for program in first] == [60, 6, 13]
    assert first[0] is few
    # The calls of four groups are tried one by one; a program all of whose groups hang is not asked again.
    assert [(program.source, len(program.parts)) for program in second] == [("some", 32)] * 3 + [("some", 4)]
