"""The small task of programs: worked programs do what is said, tests tell functions apart, splits do not leak."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from rl4dlm.tasks import load_task
from rl4dlm.tasks.code.mini import behaviour
from rl4dlm.tasks.code.operations import KINDS, OPERATIONS, Step, draw_steps, draw_value, value_of, written

SPLITS = ("train", "validation", "test")


def run(program: str, call: str) -> Any:
    """The value of a call of one of our own programs, which this repository has written, not a model."""
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102
    return eval(call, names)  # noqa: S307


def rows(split: str, **options: Any) -> list[dict[str, Any]]:
    return load_task("code_mini", **{"size": 60, **options}).rows(split)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_an_operation_does_what_the_operation_does(kind: str) -> None:
    rng = random.Random(0)
    values = [draw_value(rng, kind) for _ in range(12)]
    for operation in (operation for operation in OPERATIONS if operation.takes == kind):
        for arguments, form in itertools.product(operation.arguments, operation.forms):
            program = f"def f(X, K, M):\n    return {form}"
            for value in values:
                given = [value, *arguments, *[None] * (2 - len(arguments))]
                wanted = operation.apply(value, *arguments)
                found = run(program, f"f{tuple(given)!r}")
                assert found == wanted and type(found) is type(wanted), (operation.phrase, form, value)


def test_worked_programs_pass_their_tests_and_come_in_several_forms() -> None:
    programs: dict[str, set[str]] = {}
    for row in rows("train", size=300, max_level=3):
        problem = json.loads(row["problem"])
        assert problem["entry_point"] == "f" and len(problem["tests"]) == 6
        for test in problem["tests"]:
            assert repr(run(row["solution"], test["call"])) == test["expected"]
        steps = row["prompt"].partition(": ")[2].split(", then ")
        assert len(steps) == row["level"] and row["prompt"].endswith("\n")
        programs.setdefault(row["prompt"], set()).add(row["solution"])
    assert sum(len(found) > 1 for found in programs.values()) > 10
    assert {row["level"] for row in rows("train", max_level=3)} == {1, 2, 3}


def test_brackets_are_where_they_are_needed() -> None:
    table = {(operation.phrase, operation.takes): operation for operation in OPERATIONS}
    steps = [Step(table["prepend {k}", "text"], ("a",)), Step(table["reverse", "text"], ())]
    seen = {written(steps, "text", random.Random(seed)) for seed in range(40)}
    assert "def f(text):\n    return ('a' + text)[::-1]" in seen
    assert "def f(text):\n    text = 'a' + text\n    return text[::-1]" in seen
    assert len(seen) == 8  # two forms each, in one line or two
    assert all(run(program, "f('bc')") == "cba" for program in seen)


def test_tests_tell_a_function_from_those_with_an_operation_less() -> None:
    rng = random.Random(1)
    table = {operation.phrase: operation for operation in OPERATIONS if operation.takes == "n"}
    idle = [Step(table["absolute"], ()), Step(table["absolute"], ())]
    assert behaviour(idle, "n") == behaviour(idle[:1], "n")
    for row in rows("test"):
        kind = row["prompt"][2 : row["prompt"].index(")")]
        tests = json.loads(row["problem"])["tests"]
        assert len({test["call"] for test in tests}) == len(tests) and len({test["expected"] for test in tests}) > 1
        # A program that returns what it is given is never right.
        assert any(run(f"def f({kind}):\n    return {kind}", t["call"]) != run("", t["expected"]) for t in tests)
    assert value_of(draw_steps(rng, "text", 3), "abc") is not None


def test_splits_share_no_function_whatever_the_seed_and_held_out_ones_are_different() -> None:
    found = {split: {row["prompt"] for seed in range(2) for row in rows(split, seed=seed)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not found[one] & found[other]
    assert len({row["prompt"] for row in rows("test", size=200)}) == 200
    # What functions do decides, not how they are described.
    table = {operation.phrase: operation for operation in OPERATIONS if operation.takes == "n"}
    five = behaviour([Step(table["add {k}"], (5,))], "n")
    assert five == behaviour([Step(table["add {k}"], (2,)), Step(table["add {k}"], (3,))], "n")


def test_rows_depend_on_the_options_alone() -> None:
    assert rows("train") == rows("train") and rows("train") != rows("train", seed=1)
    assert {row["prompt"][:7] for row in rows("train", kinds=["items"])} == {"f(items"}
    assert {len(json.loads(row["problem"])["tests"]) for row in rows("test", tests=3, min_level=2)} == {3}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kinds": "text"}, "kinds='text'"),
        ({"kinds": ["texts"]}, "text, items, n"),
        ({"min_level": 3}, "min_level=3, max_level=2"),
        ({"max_level": 5}, "max_level=5"),
        ({"tests": 1}, "tests=1"),
        ({"size": 0}, "size=0"),
    ],
)
def test_options_that_are_not_allowed_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_task("code_mini", **options)


def test_there_are_only_so_many_functions() -> None:
    with pytest.raises(ValueError, match="size=500; after .* rows there are hardly more test functions of 1 to 1"):
        load_task("code_mini", size=500, max_level=1, kinds=["items"]).rows("test")
