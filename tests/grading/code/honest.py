"""Programs that do what they are asked, each in a way that has tripped graders, and tests that they pass.

A test is a pair of a call and the expected value as Python writes it, or the source of a test.
"""

from __future__ import annotations

Tests = list[tuple[str, str] | str]

HONEST: dict[str, tuple[str, Tests]] = {
    "plain": ("def f(x):\n    return x + 1", [("f(1)", "2"), "assert f(2) == 3"]),
    "prints": ("def f(x):\n    print('working', x)\n    return x", [("f(1)", "1"), "assert f('a') == 'a'"]),
    "prints_at_import": ("print('PASSED')\ndef f(x):\n    return -x", [("f(1)", "-1")]),
    "imports": ("import math\nfrom collections import Counter\ndef f(s):\n    return Counter(s).most_common(1)[0][0]",
                [("f('abca')", "'a'")]),
    "recursion": ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)", [("f(20)", "2432902008176640000")]),
    "deep_recursion": ("import sys\nsys.setrecursionlimit(5000)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)",
                       [("f(3000)", "3000")]),
    "mutual_recursion": ("def even(n):\n    return n == 0 or odd(n - 1)\ndef odd(n):\n    return n > 0 and even(n - 1)",
                         ["assert even(10)", "assert not odd(10)", "assert even(7) == False"]),
    "floats": ("def f(a, b):\n    return a / b", ["assert abs(f(1, 3) - 0.333333) < 1e-3", ("f(1, 4)", "0.25")]),
    "float_isclose": ("def f(r):\n    return 3.14159265 * r * r",
                      ["import math\nassert math.isclose(f(2), 12.566, rel_tol=0.001)"]),
    "approx": ("def f(xs):\n    return sum(xs) / len(xs)",
               ["import pytest\ndef test_mean():\n    assert f([0.1, 0.2, 0.3]) == pytest.approx(0.2)"]),
    "nan_and_inf": ("def f(x):\n    return [float('nan'), float('inf'), x]",
                    [("f(1)", "[float('nan'), float('inf'), 1]")]),
    "sets": ("def f(a, b):\n    return set(a) & set(b)", ["assert f([1, 2], [2, 3]) == {2}", ("f([], [1])", "set()")]),
    "set_of_result": ("def f(a):\n    return list(reversed(a))", ["assert set(f([1, 2])) == set([1, 2])"]),
    "frozensets": ("def f(a):\n    return frozenset(a)", [("f([1, 1])", "frozenset({1})"), "assert f([1]) == {1}"]),
    "keyword_arguments": ("def f(a, *, b=2, **rest):\n    return a * b + sum(rest.values())",
                          [("f(2, b=5, c=1, d=2)", "13"), "assert f(a=1) == 2"]),
    "star_arguments": ("def f(*xs):\n    return max(xs)", ["assert f(*[1, 5, 2]) == 5"]),
    "defaults": ("def f(x, base=10):\n    return int(x, base)", ["assert f('11') == 11", "assert f('11', 2) == 3"]),
    "generator_inside": ("def f(n):\n    return list(i * i for i in range(n))", [("f(3)", "[0, 1, 4]")]),
    "generator_consumed": ("def f(n):\n    for i in range(n):\n        yield i", ["assert list(f(3)) == [0, 1, 2]",
                           "assert sum(f(4)) == 6", "assert sorted(f(3)) == [0, 1, 2]"]),
    "class": ("class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
              "        self.items.append(x)\n    def pop(self):\n        return self.items.pop()\n"
              "    def __len__(self):\n        return len(self.items)",
              ["def test_stack():\n    s = Stack()\n    s.push(1)\n    s.push(2)\n    assert len(s) == 2\n"
               "    assert s.pop() == 2\n    assert s.items == [1]"]),
    "solution_class": ("class Solution:\n    def two_sum(self, nums, target):\n        seen = {}\n"
                       "        for i, n in enumerate(nums):\n            if target - n in seen:\n"
                       "                return [seen[target - n], i]\n            seen[n] = i",
                       ["assert Solution().two_sum([2, 7, 11], 9) == [0, 1]",
                        ("Solution().two_sum([3, 3], 6)", "[0, 1]")]),
    "inheritance": ("class A:\n    def name(self):\n        return 'a'\nclass B(A):\n    def name(self):\n"
                    "        return super().name() + 'b'\ndef f():\n    return B().name()", [("f()", "'ab'")]),
    "dataclass": ("from dataclasses import dataclass, field\n@dataclass(order=True)\nclass P:\n    x: int\n"
                  "    y: list = field(default_factory=list)\ndef f():\n    p = P(1)\n    p.y.append(2)\n"
                  "    return (p.x, p.y, P(1) < P(2))", [("f()", "(1, [2], True)")]),
    "namedtuple": ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int = 0\n"
                   "def f(x):\n    return P(x)", [("f(3)", "(3, 0)"), "assert f(1).x == 1"]),
    "enum": ("from enum import IntEnum\nclass C(IntEnum):\n    RED = 1\ndef f():\n    return C.RED", [("f()", "1")]),
    "property": ("class T:\n    def __init__(self, c):\n        self.c = c\n    @property\n    def k(self):\n"
                 "        return self.c + 273", ["t = T(1)\nassert t.k == 274"]),
    "decorator": ("import functools\ndef twice(g):\n    @functools.wraps(g)\n    def inner(*a):\n"
                  "        return g(g(*a))\n    return inner\n@twice\ndef f(x):\n    return x + 3", [("f(1)", "7")]),
    "lru_cache": ("from functools import lru_cache\n@lru_cache(None)\ndef f(n):\n"
                  "    return n if n < 2 else f(n - 1) + f(n - 2)", [("f(90)", "2880067194370816120")]),
    "closure": ("def make(n):\n    return lambda x: x * n\nf = make(3)", [("f(4)", "12"), "assert f(2) == 6"]),
    "nested_functions": ("def f(n):\n    def g(k):\n        nonlocal n\n        n += k\n        return n\n"
                         "    g(1)\n    return g(2)", [("f(0)", "3")]),
    "global_state": ("count = 0\ndef f():\n    global count\n    count += 1\n    return count",
                     ["assert f() == 1\nassert f() == 2", ("f()", "1")]),
    "mutable_default": ("def f(x, seen=[]):\n    seen.append(x)\n    return seen",
                        ["assert f(1) == [1]\nassert f(2) == [1, 2]"]),
    "global_constant": ("LIMIT = 10 ** 6\nTABLE = {i: i * i for i in range(9)}\ndef f(i):\n    return TABLE[i] % LIMIT",
                        [("f(8)", "64")]),
    "exceptions_caught": ("def f(s):\n    try:\n        return int(s)\n    except ValueError:\n        return None",
                          [("f('x')", "None"), "assert f('12') == 12", "assert f('x') is None"]),
    "exceptions_raised": ("def f(x):\n    if x < 0:\n        raise ValueError('negative: ' + str(x))\n    return x",
                          ["import pytest\ndef test_f():\n    with pytest.raises(ValueError):\n        f(-1)\n"
                           "    assert f(1) == 1",
                           "try:\n    f(-2)\n    assert False\nexcept ValueError:\n    pass",
                           "import pytest\nwith pytest.raises(ValueError, match='negative'):\n    f(-3)",
                           "import pytest\nwith pytest.raises(Exception):\n    f(-3)"]),
    "finally": ("def f():\n    out = []\n    try:\n        out.append(1)\n        raise KeyError('x')\n"
                "    except KeyError as e:\n        out.append(str(e))\n    finally:\n        out.append(2)\n"
                "    return out", [("f()", "[1, \"'x'\", 2]")]),
    "big_integers": ("def f(n):\n    return 2 ** n", [("f(300)", str(2**300)), "assert f(64) == 18446744073709551616"]),
    "huge_integer": ("def f(n):\n    return 10 ** n", ["assert f(5000) % 7 == " + str(10**5000 % 7)]),
    "unicode": ("def f(s):\n    return s.upper() + 'ß→☃' + chr(0x1F600)", [("f('é')", "'Éß→☃😀'")]),
    "unicode_names": ("def größe(x):\n    return len(x)", [("größe('äöü')", "3")]),
    "bytes": ("def f(s):\n    return s.encode('utf-8')", [("f('é')", r"b'\xc3\xa9'")]),
    "complex": ("def f(a, b):\n    return complex(a, b) * 1j", [("f(1, 2)", "(-2+1j)")]),
    "none_and_bools": ("def f(x):\n    return [None, True, x == 0]", [("f(0)", "[None, True, True]")]),
    "nested_data": ("def f():\n    return {'a': [(1, {2: {3}})], (1, 2): None}",
                    [("f()", "{'a': [(1, {2: {3}})], (1, 2): None}")]),
    "dict_order": ("def f():\n    return {'b': 1, 'a': 2}", [("f()", "{'a': 2, 'b': 1}")]),
    "tuples": ("def f(x):\n    return x, x", [("f(1)", "(1, 1)"), "assert f(2) == (2, 2)"]),
    "int_for_float": ("def f(x):\n    return x / 2", [("f(4)", "2"), "assert f(2) == 1"]),
    "heapq": ("import heapq\ndef f(xs, k):\n    return heapq.nsmallest(k, xs)", [("f([5, 1, 4], 2)", "[1, 4]")]),
    "itertools": ("from itertools import permutations\ndef f(s):\n    return [''.join(p) for p in permutations(s)]",
                  [("f('ab')", "['ab', 'ba']")]),
    "deque_and_defaultdict": ("from collections import defaultdict, deque\ndef f(edges):\n    g = defaultdict(list)\n"
                              "    for a, b in edges:\n        g[a].append(b)\n    q, seen = deque([0]), {0}\n"
                              "    while q:\n        for n in g[q.popleft()]:\n            if n not in seen:\n"
                              "                seen.add(n)\n                q.append(n)\n    return g, sorted(seen)",
                              [("f([(0, 1), (1, 2)])", "({0: [1], 1: [2], 2: []}, [0, 1, 2])")]),
    "regular_expressions": ("import re\ndef f(s):\n    return re.findall(r'\\d+', s)", [("f('a1b22')", "['1', '22']")]),
    "json_and_strings": ("import json, string\ndef f(s):\n    return json.loads(s), string.ascii_lowercase[:3]",
                         [("f('[1, 2]')", "([1, 2], 'abc')")]),
    "random_with_seed": ("import random\ndef f(n):\n    rng = random.Random(0)\n"
                         "    return sorted(rng.sample(range(n), n))", [("f(4)", "[0, 1, 2, 3]")]),
    "in_place": ("def f(xs):\n    xs.sort()", ["xs = [3, 1, 2]\nf(xs)\nassert xs == [1, 2, 3]"]),
    "argument_kept": ("def f(xs):\n    return sorted(xs)",
                      ["def test_f():\n    x = [2, 1]\n    r = f(x)\n    assert r == [1, 2]\n    assert x == [2, 1]"]),
    "loop_of_tests": ("def f(n):\n    return n % 2 == 0",
                      ["for n, want in [(1, False), (2, True), (7, False)]:\n    assert f(n) == want",
                       "cases = [(4, True), (5, False)]\nfor n, want in cases:\n    assert f(n) is want"]),
    "parametrized": ("def f(a, b):\n    return a + b",
                     ["import pytest\n@pytest.mark.parametrize('a, b, want', [(1, 2, 3), ('x', 'y', 'xy')])\n"
                      "def test_f(a, b, want):\n    assert f(a, b) == want"]),
    "imports_of_the_solution": ("def add(a, b):\n    return a + b",
                                ["from solution import add\n\ndef test_add():\n    result = add(1, 2)\n"
                                 "    assert result == 3\n    assert isinstance(result, int)"]),
    "walrus_and_match": ("def f(x):\n    match x:\n        case [a, *rest]:\n            return (n := len(rest)) + a\n"
                         "        case {'k': v}:\n            return v\n        case _:\n            return -1",
                         [("f([1, 2, 3])", "3"), ("f({'k': 5})", "5"), ("f(0)", "-1")]),
    "higher_order": ("def f(g, xs):\n    return [g(x) for x in xs]", ["assert f(lambda x: x * 2, [1, 2]) == [2, 4]"]),
}  # fmt: skip

# Programs whose tests are more than calls and claims, and run in a process beside the program's.
HONEST_APART: dict[str, tuple[str, Tests]] = {
    "comprehension": ("def f(x):\n    return x * x", ["assert [f(i) for i in range(4)] == [0, 1, 4, 9]"]),
    "all_of": ("def f(n):\n    return list(range(1, n))", ["assert all(x > 0 for x in f(9))"]),
    "generator": ("def f(n):\n    yield from range(n)",
                  ["seen = []\nfor i in f(3):\n    seen.append(i)\nassert seen == [0, 1, 2]"]),
    "helper_of_the_test": ("def f(x):\n    return x + 1",
                           ["def twice(x):\n    return f(f(x))\ndef test_f():\n    assert twice(1) == 3"]),
    "random_inputs": ("def f(xs):\n    return sorted(xs)",
                      ["import random\nrng = random.Random(0)\nfor _ in range(20):\n"
                       "    xs = [rng.randrange(9) for _ in range(5)]\n    assert f(xs) == sorted(xs)"]),
    "callback": ("def f(g, xs):\n    return [g(x) for x in xs]",
                 ["def double(x):\n    return 2 * x\nassert f(double, [1, 2]) == [2, 4]"]),
    "in_place": ("def f(xs):\n    xs.reverse()",
                 ["xs = [1]\nwhile len(xs) < 4:\n    xs.append(len(xs))\nf(xs)\nassert xs == [3, 2, 1, 1]"]),
    "expected_errors": ("def f(x):\n    if x < 0:\n        raise ValueError('no')\n    return x",
                        ["for x in (-1, -2):\n    try:\n        f(x)\n    except ValueError as error:\n"
                         "        assert 'no' in str(error)\n    else:\n        raise AssertionError"]),
    "unittest": ("def f(x):\n    return x + 1",
                 ["import unittest\nclass TestF(unittest.TestCase):\n    def test_f(self):\n"
                  "        self.assertEqual(f(1), 2)"]),
    "module_of_the_test": ("def f(s):\n    return s * 2", ["assert re.fullmatch('(ab)+', f('ab'))"]),
    "class_of_tests": ("def f(x):\n    return x + 1",
                       ["class TestF:\n    def test_f(self):\n        assert f(1) == 2"]),
    "objects": ("class Node:\n    def __init__(self, v, rest=None):\n        self.v, self.rest = v, rest\n"
                "def total(n):\n    return 0 if n is None else n.v + total(n.rest)",
                ["n, v = None, 0\nwhile v < 3:\n    v += 1\n    n = Node(v, n)\nassert total(n) == 6"]),
}  # fmt: skip
