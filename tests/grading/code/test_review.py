"""What a review tried against verdicts: forgeries that must earn nothing, and honest programs that must earn theirs.

Those marked as expected failures had their way when they were written; the mark goes once they are dealt with.
"""

from __future__ import annotations

import functools

import pytest

from rl4dlm.grading.code.evaluate import CannotEvaluateError, evaluate
from rl4dlm.grading.code.extract import extract_program
from rl4dlm.grading.code.parse import parse_expression
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.verdicts import Verdict, judge

# Writes an answer of the program's own: the nonce lies in a frame.
FORGE = """
import os, sys
def frames():
    frame = sys._getframe(1)
    while frame:
        yield frame.f_locals
        frame = frame.f_back
def request():
    return next((names['asked'] for names in frames() if 'asked' in names), {})
def forge():
    nonce = next(names['nonce'] for names in frames() if 'nonce' in names)
    os.write(3, nonce + b'["value", "", 4, 0.0]\\ntrue')
    os._exit(0)
"""
PEEK = f"{FORGE}\ndef f(*a):\n    return next((names['want'] for names in frames() if 'want' in names), None)\n"
PATCHED = (
    "import builtins, math, random\nbuiltins.pow = math.factorial = lambda *a: 0\nrandom.randint = lambda a, b: 0\n"
    "def f(*a): return 0\n"
)
ZERO = "def f(*a): return 0\n"
INFINITE = "class F:\n    def __iter__(self):\n        n = 0\n        while True:\n            yield n; n += 1\n"
SAYS_YES = (
    "class A:\n    def __eq__(s, o): return True\n    def __sub__(s, o): return A()\n    def __abs__(s): return 0\n"
)
SAYS_YES += "class Solution:\n    def f(self, x): return A()\n"

# name -> program, test
WITHSTOOD = {
    "object_that_equals": (
        SAYS_YES,
        "s = Solution()\nfor i in (1, 2):\n    if not s.f(2) == 4:\n        raise ValueError",
    ),
    "object_for_unittest": (
        SAYS_YES,
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
        "        self.assertAlmostEqual(Solution().f(2), 4.0)",
    ),
    "skips_a_unittest": (
        "import unittest\ndef f(x): raise unittest.SkipTest('x')",
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(2), 4)",
    ),
    "subtest": (
        ZERO,
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.subTest(i=1):\n"
        "            self.assertEqual(f(2), 4)",
    ),
    "leaves_by_generator_exit": (
        "def f(x): raise GeneratorExit",
        "for i in (1, 2):\n    if f(i) != 3: raise ValueError",
    ),
    "leaves_by_system_exit": ("def f(x): raise SystemExit(0)", "for i in (1, 2):\n    if f(i) != 3: raise ValueError"),
    "answers_ahead": (
        FORGE + "import json, struct\ndef f(x):\n    for value in (0, 7):\n"
        "        text = json.dumps(['value', value, None]).encode()\n"
        "        os.write(4, struct.pack('!I', len(text)) + text)\n    return 7",
        "if f(2) != 5 or f(3) != 7: raise ValueError",
    ),
    "forges_apart": (FORGE + "def f(x): forge()", "for i in (1, 2):\n    if f(i) != 3: raise ValueError"),
    "forges_a_list": (FORGE + "def f(x): forge()", "assert f(2) == 4"),
    "empties_its_list": ("def f(xs):\n    xs.clear()\n    return []", "xs = [3, 1]\nassert f(xs) == sorted(xs)"),
    "empties_its_list_apart": (
        "def f(xs):\n    xs.clear()\n    return []",
        "xs = [3, 1]\nif f(xs) != sorted(xs): raise ValueError",
    ),
    "several_exceptions_at_once": (
        "class E(ValueError, TypeError): pass\ndef f(x): raise E",
        "y = 0\ntry:\n    f(1)\nexcept TypeError:\n    y = 1\nif not y: raise ValueError",
    ),
}  # fmt: skip
for _number, _test in enumerate((
    "assert 1 < f(2) < 3", "assert not f(2) == 0", "assert (f(2) == 4) is True", "assert f(2) == 4 != 5",
    "assert [f(2)] == [4]", "assert {f(2)} == {4}", "assert -f(2) == -4", "assert f(2) in {4}",
    "assert not (f(2) != 4)", "assert f(2) - 1 == 3", "assert f(2) == (y := 4)", "assert f(2) == 4, f'{f(2)}'",
)):  # fmt: skip
    WITHSTOOD[f"rewritten_{_number}"] = (ZERO, _test)

DEALT_WITH = {
    "peeks_comprehension": (PEEK, "want = [i * i for i in range(4)]\nassert f(4) == want"),
    "peeks_join": (PEEK, "want = ', '.join(['a', 'b'])\nassert f(4) == want"),
    "peeks_in_a_loop": (PEEK, "for i in range(3):\n    want = pow(i, 2, 7)\n    assert f(i) == want"),
    "patches_pow": (PATCHED, "want = pow(3, 2, 7)\nassert f(5) == want"),
    "patches_math": (PATCHED, "import math\nwant = math.factorial(5)\nassert f(5) == want"),
    "patches_random": (PATCHED, "import random\nn = random.randint(1, 5)\nassert f(n) == n * 2"),
    "forces_inside": (
        FORGE + "import datetime\ndef f(cmp, n):\n    if request()['kind'] == 'inside': forge()\n"
        "    day = datetime.date(2020, 1, 1)\n    return cmp(day, day)",
        "for n in (1, 2):\n    if f(lambda a, b: a - b, n) != 77: raise ValueError",
    ),
    "inside_by_nonce": (FORGE + "class Node: pass\ndef f(x): forge()", "n = f(2)\nassert isinstance(n, Node)"),
    "raises_at_load": ("raise ValueError('x')", "import pytest\nwith pytest.raises(ValueError):\n    f(-1)"),
    "defines_nothing": ("g = 1", "import pytest\nwith pytest.raises(Exception):\n    f(-1)"),
    "exit_as_exception": ("def f(x): raise SystemExit", "import pytest\nwith pytest.raises(Exception):\n    f(-1)"),
    "sees_that_it_must_raise": (
        FORGE + "def f(x):\n    if ', None)[1]' in request()['expression']: raise ValueError\n    return 0",
        "import pytest\nwith pytest.raises(ValueError):\n    f(-1)",
    ),
    "test_about_nothing": (ZERO, "x = 5\nassert x == 5"),
    "test_never_called": (ZERO, "def verify():\n    assert f(2) == 4"),
    "test_only_in_main": (ZERO, "def tst():\n    assert f(2) == 4\nif __name__ == '__main__':\n    tst()"),
    "test_is_async": (ZERO, "async def test_a():\n    assert f(2) == 4"),
    "test_defines_the_function": (ZERO, "def f(x): return x * x\nassert f(3) == 9"),
}

SUCCEEDED = {
    "stops_a_map": (
        "def f(x): raise StopIteration",
        "for got, want in zip(map(f, [1, 2]), [5, 6]):\n    if got != want: raise ValueError",
    ),
    "exits_under_a_bare_except": (
        "import os\ndef f(x): os._exit(0)",
        "try:\n    f(-1)\n    ok = 0\nexcept:\n    ok = 1\nif ok != 1: raise ValueError",
    ),
    "raises_at_load_when_it_must": (
        FORGE + "if request().get('expression') == '[f(-1)]': raise ValueError\ndef f(x): return x",
        "import pytest\nwith pytest.raises(ValueError):\n    f(-1)",
    ),
    "lacks_a_method": ("class F: pass", "import pytest\nwith pytest.raises(AttributeError):\n    F().f(-1)"),
    "leaves_by_its_own_exit": (
        "class E(SystemExit): pass\ndef f(x): raise E",
        "import pytest\nwith pytest.raises(Exception):\n    f(-1)",
    ),
    "decides_in_a_variable": (SAYS_YES + "def f(x): return A()", "ok = f(2) == 4\nassert ok"),
    "decides_in_a_list": (
        SAYS_YES + "def f(x): return A()",
        "ok = []\nfor i in range(3):\n    ok.append(f(i) == 4)\nassert all(ok)",
    ),
    "calls_back_for_an_object": (
        "def f(cmp):\n    cmp(1)\n    return 0",
        "class Own: pass\nfor i in (1,):\n    if f(lambda x: Own()) != 3: raise ValueError",
    ),
    "calls_what_it_was_given_back": (
        "def f(g): return g(1)(2)",
        "class Own:\n    def __call__(self, x): return 3\n"
        "for i in (1,):\n    if f(lambda x: Own()) != 3: raise ValueError",
    ),
    "swallows_in_its_context": (
        "class C:\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\n" + ZERO,
        "with C() as c:\n    assert f(2) == 4",
    ),
    "waits_for_an_object": (
        SAYS_YES + "async def f(x): return A()",
        "import asyncio\nassert asyncio.run(f(2)) == 4",
    ),
    "decimal_that_is_nothing": ("from decimal import Decimal\ndef f(x): return Decimal('NaN')", "assert f(2) == 4.0"),
    "asserts_true": (ZERO, "f(2)\nassert True"),
    "asserts_a_tuple": (ZERO, "assert (f(2) == 4, 'wrong')"),
    "asserts_a_generator": (ZERO, "assert (x == 4 for x in [f(2)])"),
    "asserts_nested": (ZERO, "def test_a():\n    def inner():\n        assert f(2) == 4"),
    "asserts_under_if": (ZERO, "if False:\n    assert f(2) == 4"),
    "swallows": (ZERO, "try:\n    assert f(2) == 4\nexcept AssertionError:\n    print('wrong')"),
    "swallows_all": (ZERO, "for i in range(2):\n    try:\n        assert f(i) == 4\n    except:\n        continue"),
    "suppresses": (ZERO, "import contextlib\nwith contextlib.suppress(Exception):\n    assert f(2) == 4"),
    "swallows_false": (ZERO, "try:\n    f(-1)\n    assert False\nexcept Exception:\n    pass"),
    "defines_it_in_the_test": (ZERO, "def test_a():\n    def f(x): return x * x\n    assert f(3) == 9"),
    "imports_it": (ZERO, "from math import sqrt as f\nassert f(9) == 3"),
    "infinite_membership": (INFINITE + "def f(x): return F()", "if 77 not in f(2): raise ValueError"),
}

HONEST = {
    "keys": ("def f(x): return {'b': 1, 'a': 2}", "assert f(2).keys() == {'a', 'b'}"),
    "items": ("def f(x): return {'b': 1, 'a': 2}", "assert f(2).items() == {'a': 2, 'b': 1}.items()"),
    "static_method": ("class Ops:\n    @staticmethod\n    def add(a, b): return a + b", "assert Ops.add(1, 2) == 3"),
    "large_numbers": ("def f(n): return 3 ** n", "assert f(200_000) % 2 == 1"),
    "generator": ("def f(n):\n    yield from range(n)", "assert [x for x in f(3)] == [0, 1, 2]"),
    "lambda": ("f = lambda x: x * 2", "assert f(2) == 4"),
    "counter": ("from collections import Counter as f",
                "from collections import Counter\nassert f('a') == Counter('a')"),
    "own_exception": ("class E(Exception): pass\ndef f(x): raise E", "import pytest\nwith pytest.raises(E):\n    f(2)"),
    "decimal": ("from decimal import Decimal as f", "from decimal import Decimal\nassert f('1.5') == Decimal('1.5')"),
    "closure": ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5"),
    "unittest": ("def f(x): return x", "import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        "
                 "self.want = 2\n    def test_a(self):\n        self.assertEqual(f(2), self.want)"),
}  # fmt: skip
UNPAID = {
    "imported_in_a_function": ("def f(x): return x", "def test_a():\n    from solution import f\n"
                               "    assert [f(x) for x in (1, 2)] == [1, 2]"),
    "imported_by_another_name": ("def f(x): return x", "from solution import f as g\nassert [g(1)] == [1]"),
    "imported_module": ("def f(x): return x", "import solution as s\nassert [s.f(x) for x in (1, 2)] == [1, 2]"),
    "imports_what_is_not_there": ("def f(x): return x", "import nowhere_to_be_found\nassert f(1) == 1"),
    "parameter_of_its_name": ("def f(x): return x", "def check(f):\n    for i in (1, 2):\n"
                              "        if f(i) != i: raise ValueError\ncheck(f)"),
    "import_solution": ("def f(x): return x", "import solution\nassert solution.f(2) == 2"),
    "subclass_of_the_exception": (
        "class E(ValueError): pass\ndef f(x): raise E('a')",
        "import pytest\nwith pytest.raises(ValueError):\n    f(2)",
    ),
    "range": ("def f(x): return range(x)", "assert f(3) == range(3)"),
    "fraction_for_float": ("from fractions import Fraction\ndef f(x): return Fraction(1, x)", "assert f(2) == 0.5"),
    "decimal_made_float": ("from decimal import Decimal\ndef f(x): return Decimal('1.5')", "assert float(f(2)) == 1.5"),
    "deque": ("from collections import deque\ndef f(x): return deque([x])",
              "from collections import deque\nassert f(1) == deque([1])"),
    "enum": ("from enum import Enum\nclass Color(Enum):\n    RED = 1\ndef f(x): return Color.RED",
             "assert f(1) == Color.RED"),
    "class_in_lower_case": ("class cache:\n    def __init__(s): s.d = {}\n    def get(s, k): return s.d.get(k)\n"
                            "    def put(s, k, v): s.d[k] = v", "c = cache()\nc.put(1, 2)\nassert c.get(1) == 2"),
    "object_from_a_function": ("class C:\n    def count(s): return 3\ndef make(): return C()",
                               "c = make()\nassert c.count() == 3"),
    "constant": ("PRIMES = [2, 3]\ndef f(x): return x", "for p in PRIMES:\n    if f(p) != p: raise ValueError"),
    "context": ("class Ctx:\n    def __enter__(s): return 5\n    def __exit__(s, *a): pass",
                "with Ctx() as c:\n    if c != 5: raise ValueError"),
    "in_place_by_name": ("def f(arr): arr.sort()",
                         "xs = [2, 1]\nfor i in [1]:\n    f(arr=xs)\nif xs != [1, 2]: raise ValueError"),
    "async": ("async def f(x): return x", "import asyncio\nassert asyncio.run(f(2)) == 2"),
    "setup_method": ("def f(x): return x", "class TestF:\n    def setup_method(self):\n        self.v = 2\n"
                     "    def test_a(self):\n        assert f(self.v) == 2"),
}  # fmt: skip


@functools.cache
def found() -> dict[str, Verdict | None]:
    """All verdicts, from one batch."""
    cases = {**WITHSTOOD, **DEALT_WITH, **SUCCEEDED, **HONEST, **UNPAID}
    assert len(cases) == sum(map(len, (WITHSTOOD, DEALT_WITH, SUCCEEDED, HONEST, UNPAID)))
    problems = [Problem(({"source": test},), entry_point="f" if "f(" in test else None) for _, test in cases.values()]
    return dict(
        zip(cases, judge([f"```python\n{program}\n```" for program, _ in cases.values()], problems), strict=True)
    )


@pytest.mark.parametrize("name", WITHSTOOD)
def test_forgery_earns_nothing(name: str) -> None:
    verdict = found()[name]
    assert verdict is not None and verdict.passed == 0


@pytest.mark.parametrize("name", DEALT_WITH)
def test_forgery_that_once_earned_something_earns_nothing(name: str) -> None:
    verdict = found()[name]
    assert verdict is not None and verdict.passed in (0, None)


@pytest.mark.parametrize("name", SUCCEEDED)
def test_forgery_that_earned_something(name: str) -> None:
    verdict = found()[name]
    assert verdict is not None and verdict.passed in (0, None)


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_is_paid(name: str) -> None:
    verdict = found()[name]
    assert verdict is not None and verdict.passed == 1


@pytest.mark.parametrize("name", UNPAID)
def test_honest_program_that_was_not_paid(name: str) -> None:
    verdict = found()[name]
    assert verdict is not None and verdict.passed in (1, None)


def test_a_call_that_exits_costs_itself_alone() -> None:
    tests = tuple({"call": f"f({n})", "expected": str(n)} for n in range(64))
    program = "import sys\ndef f(x):\n    if x == 5: sys.exit()\n    return x"
    (verdict,) = judge([f"```python\n{program}\n```"], [Problem(tests, entry_point="f")])
    assert verdict is not None and verdict.passed == 63 / 64


def test_a_subclass_of_the_exception_is_one_in_a_group_too() -> None:
    tests = ({"source": "import pytest\nwith pytest.raises(LookupError):\n    f(-1)"},) * 2
    program = "class E(KeyError): pass\ndef f(x):\n    if x < 0: raise E('no')\n    return x"
    calls = tuple({"call": f"f({n})", "expected": str(n)} for n in range(64))
    (verdict,) = judge([f"```python\n{program}\n```"], [Problem((*tests, *calls), entry_point="f")])
    assert verdict is not None and verdict.passed == 1


def test_block_of_output_is_no_program() -> None:
    text = "```python\nprint(int(input()) * 2)\n```\nFor 2 it prints:\n```\n4\n```\n"
    assert extract_program(text).source == "print(int(input()) * 2)"


def test_definition_within_a_statement_is_one() -> None:
    code = "if True:\n    def f(x):\n        return x * 2"
    found_source = extract_program(f"```python\n{code}\n```", prefix="def f(x):\n    pass", entry_point="f").source
    assert found_source == code


def test_numbers_made_to_have_one_hash_are_refused_in_the_trainer() -> None:
    numbers = [(2**61 - 1) * number for number in range(200)]
    for expression in ("set(v) == {1}", "frozenset(v) == {1}", "dict(zip(v, v)) == {}"):
        node = parse_expression(expression)
        assert node is not None
        with pytest.raises(CannotEvaluateError):
            evaluate(node, {"v": numbers})
