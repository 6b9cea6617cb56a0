"""Judges programs: which of a problem's tests each completion's program passes.

Owns the way from completions and problems to verdicts: what is asked of the sandbox, in one batch, and what its answers
mean. Values are compared in this process, with expectations that have never left it.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from rl4dlm.grading.code.compare import equal, same_output
from rl4dlm.grading.code.evaluate import CannotEvaluateError, evaluate, is_within
from rl4dlm.grading.code.extract import Found, extract_program
from rl4dlm.grading.code.grouping import run_in_groups
from rl4dlm.grading.code.parse import defined_names, parse, parse_expression
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.rewrite import Raises, Rewritten, rewritten
from rl4dlm.grading.code.scorable import binds, with_program_by_name
from rl4dlm.grading.code.source import free_names, runnable, with_expected_first
from rl4dlm.grading.pool import current_settings
from rl4dlm.grading.sandbox.backends import run_programs
from rl4dlm.grading.sandbox.programs import Call, Check, Feed, Part, Program, Result

PASSED, FAILED, NOT_SCORABLE = "passed", "failed", "not_scorable"
OUTSIDE, APART, INSIDE = "outside", "apart", "inside"

_MISSING = re.compile(
    r"NameError\b[^:]*: name '(\w+)' is not defined.*|AttributeError\b[^:]*: .* has no attribute '(\w+)'.*"
)
_REMEMBERED = 1 << 16  # characters of a problem; those of competitions have megabytes of tests

_EXCEPTIONS = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}


class TestVerdict(NamedTuple):
    """What became of one test of one program.

    Attributes:
        outcome: `passed`, `failed` or `not_scorable`.
        where: where it was decided: `outside` (values came back and were compared here), `apart` (the test ran in a
            process beside the program's) or `inside` (it ran in the program's own process, which can tamper with it).
        status: of the part that decided, see `Result.status`; `value` where all parts gave one; `no_code` or `syntax`
            where there was no program to run; `malformed` where the test says nothing of a program, `inside` where it
            was passed where a program could have tampered with it, and `sandbox_inside` does not say that it is paid.
    """

    outcome: str
    where: str
    status: str


@dataclass(frozen=True)
class Verdict:
    """What became of a completion.

    Attributes:
        tests: one for each test of the problem.
        program: what was run; None where the completion has none that parses.
    """

    tests: tuple[TestVerdict, ...]
    program: str | None

    @property
    def passed(self) -> float | None:
        """The share of tests that were passed; None where the problem has none that can be scored, or a test of the
        program's was lost by the machine that ran it."""
        judged = [test for test in self.tests if test.status not in ("malformed", "inside")]
        if not judged or any(test.outcome == NOT_SCORABLE for test in judged):
            return None
        return sum(test.outcome == PASSED for test in judged) / len(judged)


class _Test(NamedTuple):
    """A test as it is asked and judged: one of `rewritten`, `expected`, `stdout` and a check."""

    parts: tuple[Part, ...]
    where: str
    rewritten: Rewritten | None = None
    expected: Any = None
    stdout: str | None = None
    tolerance: float | None = None


def judge(
    completions: Sequence[str],
    problems: Sequence[str | Problem | None],
    *,
    programs: Sequence[str | None] | None = None,
) -> list[Verdict | None]:
    """Runs the program of each completion and says which tests it passes. All run in one batch, equal ones once.

    Args:
        completions: texts of a model.
        problems: of each its problem, as the column `problem` has it; None where there is none.
        programs: instead of looking for programs in the completions: these, None for none.

    Returns:
        A verdict for each; None without a problem, or where its text is no `Problem`.
    """
    batch: dict[str, _Prepared | None] = {}
    given = [_prepared(problem, batch) for problem in problems]
    found: list[Found] = []
    for row, (completion, prepared) in enumerate(zip(completions, given, strict=True)):
        if programs is not None:
            found.append(Found(programs[row], "no_code"))
        elif prepared is None:
            found.append(Found(None, "no_code"))
        else:
            problem = prepared.problem
            found.append(extract_program(completion, prefix=problem.prefix, entry_point=problem.entry_point))
    asked: dict[Program, int] = {}
    places: list[int | None] = []  # of each row's program in `asked`
    for (source, _), prepared in zip(found, given, strict=True):
        parts = () if prepared is None else tuple(part for test in prepared.tests for part in test.parts)
        if source is None or prepared is None or not parts:
            places.append(None)
        else:
            places.append(asked.setdefault(Program(source, parts, prepared.problem.setup), len(asked)))
    results = run_in_groups(list(asked), run_programs) if asked else []
    return [
        None if prepared is None else _verdict(prepared.tests, *program, None if place is None else results[place])
        for prepared, program, place in zip(given, found, places, strict=True)
    ]


def read_problem(value: Any) -> Problem | None:
    """A value of the column `problem`; None where it is none."""
    if isinstance(value, Problem):
        return value
    try:
        fields = json.loads(value)
        tests = tuple({str(key): str(part) for key, part in test.items()} for test in fields["tests"])
        texts = {name: str(fields.get(name) or "") for name in ("setup", "prefix")}
        return Problem(tests, entry_point=fields.get("entry_point") or None, **texts) if tests else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


class _Prepared(NamedTuple):
    problem: Problem
    tests: tuple[_Test, ...]


def _prepared(value: str | Problem | None, batch: dict[str, _Prepared | None]) -> _Prepared | None:
    """A problem with its tests as they are asked. `batch` has those of this call: a group's completions share one."""
    if value is None:
        return None
    text = value.to_json() if isinstance(value, Problem) else value
    if text not in batch:
        alone = current_settings().sandbox_backend == "local"
        batch[text] = _prepare_once(text, alone) if len(text) <= _REMEMBERED else _prepare(text, alone)
    return batch[text]


def _prepare(text: str, alone: bool) -> _Prepared | None:
    problem = read_problem(text)
    if problem is None:
        return None
    setup = parse(problem.setup)
    trusted = frozenset() if setup is None else frozenset(defined_names(setup))
    return _Prepared(problem, tuple(_test(test, problem, trusted, alone) for test in problem.tests))


_prepare_once = lru_cache(maxsize=4096)(_prepare)


def _test(test: dict[str, str], problem: Problem, trusted: frozenset[str], alone: bool) -> _Test:
    tolerance = _tolerance(test)
    if "stdin" in test and "stdout" in test:
        return _Test((Feed(test["stdin"]),), OUTSIDE, stdout=test["stdout"], tolerance=tolerance)
    if problem.entry_point in trusted:
        return _Test((), OUTSIDE)  # the set-up defines what is asked for
    if "call" in test and "expected" in test:
        if parse(test["call"]) is not None and not free_names(test["call"]) - trusted:
            return _Test((), OUTSIDE)  # it calls nothing of the program
        expected = parse_expression(test["expected"])
        if expected is not None and is_within(expected, {"nan", "inf"}):
            try:
                value = evaluate(expected, {"nan": float("nan"), "inf": float("inf")})
            except CannotEvaluateError:
                return _Test((), OUTSIDE)
            return _Test((Call(test["call"]),), OUTSIDE, expected=value, tolerance=tolerance)
        # What is expected is more than data. Then it is a test given as source.
        test = {"source": f"assert {test['call']} == ({test['expected']})"}
    if "source" not in test:
        return _Test((), OUTSIDE)
    asked = with_program_by_name(test["source"], alone=alone)
    if asked is None or binds(asked, problem.entry_point):
        return _Test((), OUTSIDE)
    turned = rewritten(asked, problem.entry_point, trusted)
    if turned is not None:
        calls = [Call(turned.expression)] if turned.expression is not None else []
        return _Test((*calls, *(Call(each.expression) for each in turned.raises)), OUTSIDE, rewritten=turned)
    source = runnable(asked, problem.entry_point)
    if source is None:
        return _Test((), OUTSIDE)
    names = free_names(source) - trusted
    if not names:
        return _Test((), OUTSIDE)  # it says nothing of the program
    return _Test((Check(with_expected_first(source, names), tuple(sorted(names))),), APART)


def _tolerance(test: dict[str, str]) -> float | None:
    try:
        return float(test["tolerance"]) if test.get("tolerance") else None
    except ValueError:
        return None


def _verdict(tests: Sequence[_Test], source: str | None, reason: str, results: Sequence[Result] | None) -> Verdict:
    found: list[TestVerdict] = []
    late = results is not None and any(result.status == "timeout" for result in results)
    place = 0
    for test in tests:
        if not test.parts:
            found.append(TestVerdict(NOT_SCORABLE, test.where, "malformed"))
        elif source is None or results is None:
            found.append(TestVerdict(FAILED, test.where, reason))
        else:
            found.append(_judged(test, results[place : place + len(test.parts)], late))
        place += len(test.parts)
    return Verdict(tuple(found), source)


def _judged(test: _Test, results: Sequence[Result], late: bool) -> TestVerdict:
    """Time that a program has used up by hanging is its own loss; where the batch's was over, it cannot be scored."""
    where = INSIDE if any(result.inside for result in results) else test.where
    for result in results:
        if result.status == "lost" or (result.status == "budget" and not late):
            return TestVerdict(NOT_SCORABLE, where, result.status)
    if test.where == APART and results[0].value == "uncalled":
        return TestVerdict(NOT_SCORABLE, where, "malformed")  # it came to its end without asking the program
    status, passed = _passes(test, results)
    if passed and where == INSIDE and current_settings().sandbox_inside != "paid":
        return TestVerdict(NOT_SCORABLE, where, "inside")
    return TestVerdict(PASSED if passed else FAILED, where, status)


def _passes(test: _Test, results: Sequence[Result]) -> tuple[str, bool]:
    if test.rewritten is not None:
        return _claims_hold(test.rewritten, results)
    (result,) = results
    if result.status != "value":
        return result.status, False
    if test.stdout is not None:
        return "value", same_output(str(result.value), test.stdout, tolerance=test.tolerance)
    if test.where == APART:
        return "value", result.value is True
    return "value", equal(result.value, test.expected, tolerance=test.tolerance)


def _claims_hold(test: Rewritten, results: Sequence[Result]) -> tuple[str, bool]:
    results = list(results)
    if test.expression is not None:
        result = results.pop(0)
        if result.status != "value":
            return result.status, False
        listed = result.value
        if not isinstance(listed, list) or any(place >= len(listed) for place in test.values):
            return "data", False
        values = [listed[place] for place in test.values]
        for claim in test.claims:
            known = {**claim.known, **{name: values[place] for name, place in claim.holes.items()}}
            try:
                if not evaluate(claim.expression, known):
                    return "wrong", False
            except CannotEvaluateError:
                return "wrong", False
    for wanted, result in zip(test.raises, results, strict=True):
        if result.status != "error" or not _raised(wanted, result.message):
            return "wrong" if result.status in ("value", "error") else result.status, False
    return "value", True


def _raised(wanted: Raises, message: str) -> bool:
    """Whether the exception of a message is one of those that are wanted, or one of Python's that derives from it."""
    name, _, text = message.partition(":")
    own, _, bases = name.strip().removesuffix(")").partition("(")
    if own == "NotLoaded" or _is_missing(wanted.expression, message) or (wanted.text or "") not in text:
        return False
    own = own.rpartition(".")[2]
    kinds = [_EXCEPTIONS[each] for each in (own, *bases.split(", ")) if each in _EXCEPTIONS] or [Exception]
    return any(
        each == own or issubclass(kind, _EXCEPTIONS.get(each, ())) for each in wanted.exceptions for kind in kinds
    )


def _is_missing(expression: str, message: str) -> bool:
    """Whether the program does not define what it is asked for. That is no exception that it raises."""
    found = _MISSING.fullmatch(message)
    return found is not None and re.search(rf"\b{found[1] or found[2]}\b", expression) is not None
