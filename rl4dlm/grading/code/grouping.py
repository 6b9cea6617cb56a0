"""Problems with hundreds of tests, such as those of EvalPlus, in a few processes per program instead of hundreds.

Owns which calls share a process, and what that means for their results. A problem of few tests, as in training, has a
process for each; of many, calls that follow one another share one, as they do in EvalPlus. What one of them does to
the program's globals is then seen by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rl4dlm.grading.sandbox.programs import Call, Part, Program, Result

_MANY = 64  # calls of a program from which on they share processes
_TOGETHER = 32
_MOST_AGAIN = 4  # processes of a program whose calls are tried one by one

# Added to the statements that run before a program. The program may replace it, and would still only state values.
_EACH = """
def _each_of(calls, copied=__import__("copy").deepcopy):
    found = []
    for call in calls:
        try:
            found.append((True, copied(call())))
        except BaseException as error:
            kinds = ", ".join(k.__name__ for k in type(error).__mro__[1:-1] if k.__module__ == "builtins")
            found.append((False, f"{type(error).__name__}({kinds}): {str(error)[:500]}"))
    return found
"""

Runner = Callable[[list[Program]], list[list[Result]]]


def run_in_groups(programs: Sequence[Program], run: Runner) -> list[list[Result]]:
    """As `run(programs)`, with calls of programs that have many of them in groups.

    Where a group has no value, since one of its calls ran out of time or returned what is no data, its calls are run
    again, each in a process of its own; but no more than four groups of a program, and those of the others fail as one.
    """
    groups = [_groups(program.parts) for program in programs]
    results: list[list[Result]] = []
    again: list[tuple[int, list[int]]] = []
    first = run([_grouped(program, found) for program, found in zip(programs, groups, strict=True)])
    for row, (found, answers) in enumerate(zip(groups, first, strict=True)):
        mine: list[Result] = []
        failed = []
        for places, answer in zip(found, answers, strict=True):
            each = _each(answer, len(places)) if len(places) > 1 else [answer]
            if len(places) > 1 and answer.status in ("timeout", "data", "output", "memory", "ended"):
                failed.append(places)
            mine += each
        results.append(mine)
        again += [(row, places) for places in failed] if len(failed) <= _MOST_AGAIN else []
    if again:
        apart = [
            Program(programs[row].source, tuple(programs[row].parts[place] for place in places), programs[row].setup)
            for row, places in again
        ]
        for (row, places), answers in zip(again, run(apart), strict=True):
            for place, answer in zip(places, answers, strict=True):
                results[row][place] = answer
    return results


def _groups(parts: Sequence[Part]) -> list[list[int]]:
    """The places of parts that share a process, in order."""
    if sum(isinstance(part, Call) for part in parts) < _MANY:
        return [[place] for place in range(len(parts))]
    groups: list[list[int]] = []
    for place, part in enumerate(parts):
        last = groups[-1] if groups else []
        together = isinstance(part, Call) and last and isinstance(parts[last[-1]], Call) and len(last) < _TOGETHER
        if together:
            last.append(place)
        else:
            groups.append([place])
    return groups


def _grouped(program: Program, groups: list[list[int]]) -> Program:
    if all(len(places) == 1 for places in groups):
        return program
    parts = tuple(
        program.parts[places[0]] if len(places) == 1 else _joined([program.parts[place] for place in places])
        for places in groups
    )
    return Program(program.source, parts, f"{program.setup}\n{_EACH}")


def _joined(calls: Sequence[Any]) -> Call:
    each = [f"lambda: ({call.expression}\n)" for call in calls]  # a line break ends what may be a comment
    return Call(f"_each_of([{', '.join(each)}])")


def _each(answer: Result, count: int) -> list[Result]:
    """The results of a group's calls."""
    if answer.status != "value":
        return [answer] * count
    found = answer.value
    if not isinstance(found, list) or len(found) != count:
        return [Result("data")] * count
    return [_one(pair) for pair in found]


def _one(pair: Any) -> Result:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return Result("data")
    return Result("value", pair[1]) if pair[0] is True else Result("error", message=str(pair[1])[:1000])
