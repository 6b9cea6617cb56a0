"""What comes back of honest programs, and of wrong ones: values, statuses, checks apart from the program."""

from __future__ import annotations

import math

import pytest

from rl4dlm.grading.sandbox import Call, Check, Feed, Limits, Part, Program, Result
from rl4dlm.grading.sandbox.pool import Sandbox


def one(sandbox: Sandbox, source: str, part: Part, *, setup: str = "", limits: Limits | None = None) -> Result:
    ((result,),) = sandbox.run([Program(source, (part,), setup)], limits or Limits(seconds=10.0), 60.0)
    return result


HONEST = {
    "arguments_by_name": ("def f(a, *, b=2): return a - b", "f(b=1, a=5)", 4),
    "recursion": ("def f(n): return 1 if n < 2 else n * f(n - 1)", "f(200)", math.factorial(200)),
    "printing": ("print('hello')\ndef f():\n    print('x')\n    return 'y'", "f()", "y"),
    "imports": ("import heapq, decimal, fractions, zlib, hashlib\nfrom math import comb\nf = comb", "f(5, 2)", 10),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(): return P(3).x",
        "f()",
        3,
    ),
    "typing": (
        "from typing import List\nclass Solution:\n    def f(self, x: List[int]): return x[::-1]",
        "Solution().f([1, 2])",
        [2, 1],
    ),
    "generator_inside": ("def f(n): return sum(x for x in range(n))", "f(10)", 45),
    "floats": ("def f(): return [0.1 + 0.2, float('inf'), -0.0]", "f()", [0.1 + 0.2, float("inf"), -0.0]),
    "sets": ("def f(): return {1, (2, 3)}", "f()", {1, (2, 3)}),
    "globals": ("cache = {}\ndef f(x):\n    cache[x] = 1\n    return len(cache)", "f(1)", 1),
    "threads": (
        "import threading\ndef f():\n    found = []\n    t = threading.Thread(target=found.append, args=(1,))\n"
        "    t.start()\n    t.join()\n    return found",
        "f()",
        [1],
    ),
    "asyncio": (
        "import asyncio\nasync def g():\n    await asyncio.sleep(0)\n    return 5\ndef f(): return asyncio.run(g())",
        "f()",
        5,
    ),
    "main_block": ("def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit('a script')", "f()", 1),
    "reads_no_input": ("import sys\ndef f(): return sys.stdin.read()", "f()", ""),
    "own_exception": (
        "class E(Exception): pass\ndef f():\n    try: raise E\n    except E: return 'caught'",
        "f()",
        "caught",
    ),
}


def test_honest_programs_have_their_values(sandbox: Sandbox) -> None:
    programs = [Program(source, (Call(expression),)) for source, expression, _ in HONEST.values()]
    results = sandbox.run(programs, Limits(seconds=10.0), 60.0)
    assert [row[0] for row in results] == [Result("value", value) for _, _, value in HONEST.values()]


@pytest.mark.parametrize(
    ("source", "part", "status", "message"),
    [
        ("def f(:", Call("f()"), "syntax", "SyntaxError"),
        ("x = '\0'", Call("x"), "syntax", ""),
        ("((" * 200, Call("x"), "syntax", ""),
        ("1 / 0", Call("1"), "error", "ZeroDivisionError: division by zero"),
        ("def f(): raise ValueError('no')", Call("f()"), "error", "ValueError: no"),
        ("", Call("f()"), "error", "NameError: name 'f' is not defined"),
        ("", Call("f("), "error", "SyntaxError"),
        ("def f(): raise SystemExit(0)", Call("f()"), "error", "SystemExit"),
        ("assert False", Call("1"), "error", "AssertionError"),
        ("def f(): return object()", Call("f()"), "data", "object"),
        ("def f(): return 'x' * 200_000", Call("f()"), "output", "bytes"),
        ("def f(n): return f(n + 1)", Call("f(0)"), "error", "RecursionError"),
        ("def f(): return bytearray(2 << 30)", Call("f()"), "memory", ""),
        ("while True: pass", Call("1"), "timeout", "longer than 0.5 seconds"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\ndef f(): raise E", Call("f()"), "error", "E"),
        ("import sys\nsys.exit(3)", Feed(""), "error", "SystemExit: 3"),
        ("print(input())", Feed(""), "error", "EOFError"),
        ("print('x' * 200_000)", Feed(""), "output", "printed more than"),
    ],
)
def test_why_there_is_no_value(sandbox: Sandbox, source: str, part: Part, status: str, message: str) -> None:
    result = one(sandbox, source, part, limits=Limits(seconds=0.5, output_bytes=100_000))
    if status == "output":
        assert result.status in ("output", "data")
    else:
        assert result.status == status
        assert message in result.message
    assert result.value is None


@pytest.mark.parametrize(
    ("source", "stdin", "printed"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", "2 3\n", "5\n"),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd\n", "ba\ndc\n"),
        ("import sys\nprint(len(sys.stdin.buffer.read()))", "x" * 100_000, "100000\n"),
        ("import os\nprint(os.read(0, 5).decode())", "hello", "hello\n"),
        ("if __name__ == '__main__': print(open(0).read(), end='')", "é\n", "é\n"),
        ("print('a')\nimport sys\nsys.exit()", "", "a\n"),
        ("import os\nprint('a', flush=True)\nos._exit(0)", "", "a\n"),
        ("import sys\nsys.stdout.write('no newline')\nsys.stderr.write('not this')", "", "no newline"),
        ("import os\nos.write(1, b'raw')", "", "raw"),
    ],
)
def test_scripts_are_fed_and_heard(sandbox: Sandbox, source: str, stdin: str, printed: str) -> None:
    assert one(sandbox, source, Feed(stdin)) == Result("value", printed)


def test_setup_runs_before_the_source(sandbox: Sandbox) -> None:
    setup = "from math import *\nclass Node:\n    def __init__(self, x): self.x = x\n"
    assert one(sandbox, "def f(node): return floor(node.x)", Call("f(Node(2.5))"), setup=setup) == Result("value", 2)


def test_the_same_in_every_run(sandbox: Sandbox) -> None:
    source = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd'})]"
    assert one(sandbox, source, Call("f()")) == one(sandbox, source, Call("f()"))


# --- checks ---------------------------------------------------------------------------------------------------------

SOURCE = """
from fractions import Fraction

class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other): return Stack(*self.items, *other.items)

class MyError(ValueError): pass

def double(x): return x * 2
def sort(items): items.sort()
def count(n):
    for number in range(n): yield number
def fail(): raise KeyError("k")
def fail_mine(): raise MyError("mine")
def apply(function, x): return function(x) + 1
def adder(n): return lambda x: x + n
def half(): return Fraction(1, 2)
def leave(): raise SystemExit(0)
def quit(): __import__("os")._exit(0)
def hang():
    while True: pass
def lie(): raise AssertionError("mine")

class Always:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __sub__(self, other): return 0
    def __abs__(self): return 0
    def __float__(self): return 0.0
    def __bool__(self): return True
    def __contains__(self, other): return True
    def startswith(self, other): return True
    def __hash__(self): return hash(3)
def always(): return Always()
def everything():
    class L(list):
        def __eq__(self, other): return True
    return L([1])
"""
NAMES = ("Stack", "MyError", "double", "sort", "count", "fail", "fail_mine", "apply", "adder", "half", "leave", "quit",
         "hang", "lie", "always", "everything", "Always")  # fmt: skip
RIGHT = [
    "assert double(2) == 4 and double('a') == 'aa'",
    "def check(candidate):\n    for x in range(5): assert candidate(x) == 2 * x\ncheck(double)",
    "items = [3, 1, 2]\nsort(items)\nassert items == [1, 2, 3]",
    "assert list(count(3)) == [0, 1, 2] and next(count(2)) == 0 and 2 in count(5)",
    "try: fail()\nexcept KeyError as error: assert error.args == ('k',)\nelse: assert False",
    "try: fail_mine()\nexcept ValueError: pass\nelse: assert False",
    "assert apply(lambda x: x * 10, 4) == 41 and apply(double, 4) == 9",
    "assert adder(3)(4) == 7",
    "from fractions import Fraction\nassert half() == Fraction(1, 2)",
    "s = Stack()\ns.push(3)\ns.push(4)\nassert s.pop() == 4 and s.items == [3] and len(s) == 1 and s",
    "assert Stack(1) + Stack(2) == Stack(1, 2)\nassert Stack(1) != Stack(2)",
    "import unittest\nunittest.TestCase().assertEqual(double([1]), [1, 1])",
    "import math\nassert math.isclose(double(0.1), 0.2)",
]
WRONG = [
    "assert double(2) == 5",
    "assert always() == 3",
    "assert 3 == always()",
    "assert always() in [3]",
    "assert 3 in always()",
    "assert abs(always() - 3) < 1e-6",
    "assert always() < 3",
    "import math\nassert math.isclose(always(), 3)",
    "assert always().startswith('x')",
    "assert Always() == 3",
    "assert Always().startswith('x')",
    "assert {always()} == {3}",
    "assert everything() == [2]",
    "import unittest\nunittest.TestCase().assertEqual(always(), 3)",
    "import unittest\nunittest.TestCase().assertAlmostEqual(always(), 3)",
    "leave()",
    "quit()\nassert True",
    "lie()",
    "undefined()",
]


def test_checks_that_hold(sandbox: Sandbox) -> None:
    (results,) = sandbox.run([Program(SOURCE, tuple(Check(text, NAMES) for text in RIGHT))], Limits(seconds=10.0), 90.0)
    assert dict(zip(RIGHT, results, strict=True)) == dict.fromkeys(RIGHT, Result("value", True))


def test_checks_that_do_not_hold_whatever_the_program_says_of_itself(sandbox: Sandbox) -> None:
    (results,) = sandbox.run([Program(SOURCE, tuple(Check(text, NAMES) for text in WRONG))], Limits(seconds=10.0), 90.0)
    for text, result in zip(WRONG, results, strict=True):
        assert result.status in ("wrong", "error", "ended"), (text, result)
        assert not result.inside, text  # no program chooses to be tested where it could tamper with the tests


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ("class Mine: pass\napply(lambda x: 1, Mine())", Result("value", True, inside=True)),
        ("try: fail_mine()\nexcept MyError: pass\nelse: assert False", Result("value", True, inside=True)),
        ("assert isinstance(Stack(), Stack)", Result("value", True, inside=True)),
        ("class Deeper(Stack): pass\nassert Deeper(1).pop() == 2", Result("wrong", None, "AssertionError: ", True)),
    ],
)
def test_tests_that_need_the_program_s_classes_run_beside_it_and_say_so(
    sandbox: Sandbox, tests: str, expected: Result
) -> None:
    assert one(sandbox, SOURCE, Check(tests, NAMES)) == expected


def test_checks_that_cannot_be_asked(sandbox: Sandbox) -> None:
    check = Check("assert double(1) == 2", NAMES)
    assert one(sandbox, "1 / 0", Check("assert True", NAMES)).message == "ZeroDivisionError: division by zero"
    assert one(sandbox, "import os\nos._exit(0)", Check("assert True", NAMES)).status == "ended"
    assert one(sandbox, "def f(:", check).status == "syntax"
    assert one(sandbox, SOURCE, Check("assert double(", NAMES)).status == "lost"  # the problem's fault
    late = one(sandbox, SOURCE, Check("hang()", NAMES), limits=Limits(seconds=0.5))
    assert late.status == "timeout"


def test_tests_are_not_within_reach_of_the_program(sandbox: Sandbox) -> None:
    source = """
import gc, sys
backwards = "terces-eht"  # so that the program does not find itself
def double(x):
    frame, seen = sys._getframe(), ""
    while frame:
        seen += repr(frame.f_code.co_consts) + repr(frame.f_locals)
        frame = frame.f_back
    for group in gc.get_objects():
        if isinstance(group, (list, tuple, dict)):
            seen += " ".join(str(item) for item in (group.values() if isinstance(group, dict) else group))
    return backwards in seen and backwards[::-1] not in seen
"""
    check = Check("secret = 'the-secret'\nassert double(1) is True, 'the program has seen its tests'", ("double",))
    assert one(sandbox, source, check) == Result("value", True)


MEMORIES = {
    "global": "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n",
    "list": "a = []\ndef f(x):\n    a.append(x)\n    return len(a)",
    "default": "def f(x, a=[]):\n    a.append(x)\n    return len(a)",
    "class": "class C:\n    n = 0\ndef f(x):\n    C.n += 1\n    return C.n",
    "list of a class": "class C:\n    seen = []\ndef f(x):\n    C.seen.append(x)\n    return len(C.seen)",
    "closure": "def make(s):\n    def f(x):\n        s.append(x)\n        return len(s)\n    return f\nf = make([])",
    "attribute": "def f(x):\n    f.n = getattr(f, 'n', 0) + 1\n    return f.n",
    "instance": "class C:\n    n = 0\n    def f(self, x):\n        self.n += 1\n        return self.n\nf = C().f",
    "generator": "g = iter(range(1, 9))\ndef f(x): return next(g)",
    "random": "import random\nr = random.Random(1)\ndef f(x): return r.random()",
    "shared random": "import random\ndef f(x): return random.random()",
    "partial": "import functools\nf = functools.partial(lambda s, x: s.append(x) or len(s), [])",
}


def test_no_part_sees_what_another_did_to_the_program(sandbox: Sandbox) -> None:
    programs = [Program(source, (Call("f(1)"), Call("f(1)"), Call("f(1)"))) for source in MEMORIES.values()]
    results = sandbox.run(programs, Limits(seconds=20.0), 120.0)
    for name, row in zip(MEMORIES, results, strict=True):
        assert row[0].status == "value" and row == [row[0]] * 3, name


def test_calls_of_a_program_without_memory_share_a_process(sandbox: Sandbox) -> None:
    source = "import os\nfrom typing import List\nLIMIT = (1, 2)\ndef g(x: List[int], n=1): return os.getpid()\n"
    source += "class Solution:\n    def f(self, x): return g([x])\n"
    remembers = source + "memory = []\n"
    calls = tuple(Call("Solution().f(1)") for _ in range(3))
    results = sandbox.run([Program(source, calls), Program(remembers, calls)], Limits(seconds=20.0), 60.0)
    assert [len({result.value for result in row}) for row in results] == [1, 3]


def test_each_call_has_its_own_time(sandbox: Sandbox) -> None:
    source = "import time\ndef f(x):\n    time.sleep(x)\n    return x\n"
    calls = tuple(Call(f"f({x})") for x in (0.6, 0.6, 0.6, 60, 0))
    (results,) = sandbox.run([Program(source, calls)], Limits(seconds=1.5), 60.0)
    assert [result.status for result in results] == ["value", "value", "value", "timeout", "value"]
