"""Tests decide the same whether Python runs them beside the program or only its values come back."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from rl4dlm.grading import pool
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.source import test_functions as functions_of
from rl4dlm.grading.code.verdicts import judge
from tests.grading.code.honest import HONEST, HONEST_APART


def mutants(program: str) -> list[str]:
    """Programs with one thing wrong: nothing returned, a number larger by one, another operator or comparison."""
    tree = ast.parse(program)
    found = []
    for place in range(sum(1 for _ in ast.walk(tree))):
        changed = copy.deepcopy(tree)
        match list(ast.walk(changed))[place]:
            case ast.Return() as node if node.value is not None:
                node.value = ast.Constant(None)
            case ast.Constant() as node if type(node.value) is int:
                node.value += 1
            case ast.BinOp() as node if isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            case ast.Compare() as node if isinstance(node.ops[0], ast.Lt | ast.Eq):
                node.ops[0] = ast.GtE() if isinstance(node.ops[0], ast.Lt) else ast.NotEq()
            case _:
                continue
        found.append(ast.unparse(changed))
    return found


def python_says(program: str, test: str) -> bool:
    """What a fresh Python makes of them. The programs are those of honest.py, and harmless."""
    calls = "".join(f"{f.name}()\n" for f in functions_of(ast.parse(test)) if not f.decorator_list)
    if "class TestF" in test:
        calls = "TestF('test_f').debug()\n" if "unittest" in test else "TestF().test_f()\n"
    text = f"import re, sys\nsys.modules['solution'] = sys.modules['__main__']\n{program}\n{test}\n{calls}print('end')"
    try:
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.endswith("end\n")


@pytest.mark.slow
def test_right_and_wrong_programs_are_told_apart_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_configured", {"sandbox_workers": 4})
    cases = [
        (program, test if isinstance(test, str) else f"assert {test[0]} == {test[1]}")
        for honest, tests in (*HONEST.values(), *HONEST_APART.values())
        for test in tests
        for program in (honest, *mutants(honest)[:12])
        # NaN equals NaN here, and parametrised tests need pytest there.
        if "nan" not in str(test) and "parametrize" not in str(test)
    ]
    with ThreadPoolExecutor(2) as threads:
        wanted = list(threads.map(python_says, *zip(*cases, strict=True)))
    problems = [Problem(({"source": test},)) for _, test in cases]
    found = judge([""] * len(cases), problems, programs=[program for program, _ in cases])
    differ = [
        case
        for case, right, verdict in zip(cases, wanted, found, strict=True)
        if verdict is None or (verdict.passed == 1.0) is not right
    ]
    assert differ == []
    assert 100 < sum(wanted) < len(cases) - 100
