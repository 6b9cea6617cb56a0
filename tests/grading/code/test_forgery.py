"""Programs earn what they do, and nothing by any other way: sixty honest ones and more than sixty that are not."""

from __future__ import annotations

import pytest

from rl4dlm.grading import pool
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.verdicts import Verdict, judge
from rl4dlm.grading.sandbox import isolation, levels
from tests.grading.code.dishonest import DISHONEST, HANGING, ONE_TEST, PROBLEM
from tests.grading.code.honest import HONEST, HONEST_APART, Tests

LEVELS = [pytest.param(level, id=level) for level in isolation.LEVELS]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_configured", {"sandbox_workers": 4})


def use(level: str) -> bool:
    """Runs programs at a level, and says whether it is the machine's strongest. Skips where there is none."""
    if reason := levels.why_not(level):
        pytest.skip(f"no level {level!r} here: {reason}")
    pool.configure(sandbox_level=level)
    return level == levels.strongest_level()


def problem_of(tests: Tests) -> str:
    return Problem(
        tuple({"source": test} if isinstance(test, str) else {"call": test[0], "expected": test[1]} for test in tests)
    ).to_json()


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def verdicts(programs: dict[str, str], problem: Problem) -> dict[str, Verdict | None]:
    completions = [fenced(program) for program in programs.values()]
    return dict(zip(programs, judge(completions, [problem] * len(programs)), strict=True))


def less_than(share: float, found: dict[str, Verdict | None]) -> dict[str, Verdict | None]:
    return {name: verdict for name, verdict in found.items() if verdict is None or verdict.passed != share}


def test_there_are_sixty_of_each() -> None:
    assert len(HONEST) >= 60 and len(DISHONEST) >= 60


@pytest.mark.parametrize("level", LEVELS)
def test_honest_programs_earn_everything(level: str) -> None:
    chosen = HONEST if use(level) else dict(list(HONEST.items())[::4])
    programs = [fenced(program) for program, _ in chosen.values()]
    found = dict(zip(chosen, judge(programs, [problem_of(tests) for _, tests in chosen.values()]), strict=True))
    assert less_than(1.0, found) == {}
    # All of it is decided from values, outside of the program's process.
    assert {test.where for verdict in found.values() if verdict for test in verdict.tests} == {"outside"}


@pytest.mark.parametrize("level", LEVELS)
def test_dishonest_programs_earn_nothing(level: str) -> None:
    chosen = DISHONEST if use(level) else dict(list(DISHONEST.items())[::4])
    assert less_than(0.0, verdicts(chosen, PROBLEM)) == {}


@pytest.mark.parametrize("level", LEVELS)
def test_programs_that_hang_earn_nothing(level: str) -> None:
    chosen = HANGING if use(level) else dict(list(HANGING.items())[::3])
    pool.configure(deadline=1.0)
    found = verdicts(chosen, ONE_TEST)
    assert less_than(0.0, found) == {}
    assert found["endless_loop"].tests[0].status == "timeout"  # type: ignore[union-attr]


def test_tests_that_are_more_than_claims_run_beside_the_program() -> None:
    programs = [fenced(program) for program, _ in HONEST_APART.values()]
    problems = [problem_of(tests) for _, tests in HONEST_APART.values()]
    found = dict(zip(HONEST_APART, judge(programs, problems), strict=True))
    assert less_than(1.0, found) == {}
    places = {name: verdict.tests[0].where for name, verdict in found.items() if verdict}
    assert {name for name, where in places.items() if where != "apart"} == set()


def test_tests_that_need_a_class_of_the_program_are_counted_as_inside() -> None:
    test = "class Own(Error):\n    pass\ntry:\n    f(-1)\nexcept Error:\n    pass\nelse:\n    raise AssertionError"
    programs = {
        "right": "class Error(Exception):\n    pass\ndef f(x):\n    if x < 0:\n        raise Error(x)\n    return x",
        "wrong": "class Error(Exception):\n    pass\ndef f(x):\n    return x",
    }
    found = verdicts(programs, Problem(({"source": test},)))
    assert [verdict.passed for verdict in found.values() if verdict] == [None, 0.0]
    assert [verdict.tests[0].where for verdict in found.values() if verdict] == ["inside", "inside"]
    pool.configure(sandbox_inside="paid")
    found = verdicts(programs, Problem(({"source": test},)))
    assert [verdict.passed for verdict in found.values() if verdict] == [1.0, 0.0]


def test_the_problem_is_one_that_an_honest_program_solves() -> None:
    honest = {"honest": "def f(x):\n    return x * x + 1", "nearly": "def f(x):\n    return 10"}
    found = verdicts(honest, PROBLEM)
    assert [verdict.passed for verdict in found.values() if verdict] == [1.0, 0.2]
    assert {test.where for test in found["honest"].tests} == {"outside", "apart"}  # type: ignore[union-attr]


def test_what_a_program_does_to_its_arguments_does_not_change_what_is_expected() -> None:
    tests: Tests = [
        "xs = [3, 1]\nassert f(xs) == sorted(xs)",
        "for n in (2, 3):\n    xs = [n, n - 1]\n    assert f(xs) == sorted(xs)",
        "n = 2\nwhile n < 5:\n    n += 1\n    xs = [-i for i in range(n)]\n    assert f(xs) == sorted(xs)",
    ]
    programs = {
        "sorts": "def f(xs):\n    return sorted(xs)",
        "sorts_in_place": "def f(xs):\n    xs.sort()\n    return xs",
        "empties": "def f(xs):\n    xs.clear()\n    return xs",
        "flattens": "def f(xs):\n    xs[:] = [0] * len(xs)\n    return xs",
    }
    found = judge(list(map(fenced, programs.values())), [problem_of(tests)] * len(programs))
    assert [verdict.passed for verdict in found if verdict] == [1.0, 1.0, 0.0, 0.0]
    assert [test.where for test in found[0].tests] == ["outside", "outside", "apart"]  # type: ignore[union-attr]


def test_scripts_are_judged_by_what_they_print() -> None:
    problem = Problem(({"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10"}))
    programs = {
        "right": "a, b = map(int, input().split())\nprint(a + b)",
        "by_another_way": "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()), end='')",
        "under_main": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
        "half": "print(3)",
        "says_more": "print('The sum is', sum(map(int, input().split())))",
        "passes_itself": "print('PASSED')\nraise SystemExit(0)",
        "fails_afterwards": "print(sum(map(int, input().split())))\nraise SystemExit(1)",
        "floods": "while True:\n    print('3' * 10000)",
    }
    shares = {name: verdict.passed for name, verdict in verdicts(programs, problem).items() if verdict}
    assert shares == dict.fromkeys(programs, 0.0) | {
        "right": 1.0,
        "by_another_way": 1.0,
        "under_main": 1.0,
        "half": 0.5,
    }
