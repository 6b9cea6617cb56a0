"""Tests that are given as source: which become calls, what is claimed of their values, and what never leaves."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from rl4dlm.grading.code.evaluate import CannotEvaluateError, evaluate, is_within
from rl4dlm.grading.code.parse import parse_expression
from rl4dlm.grading.code.rewrite import Rewritten, rewritten
from rl4dlm.grading.code.source import free_names, runnable

CALLS = {
    "assert f(2) == 4": "[f(2)]",
    "assert 4 == f(2), 'message'": "[f(2)]",
    "assert f(2)": "[f(2)]",
    "assert not f(2)": "[f(2)]",
    "assert f(2) is None": "[f(2)]",
    "assert f(2) is True": "[f(2)]",
    "assert 1 <= f(2) < 9": "[f(2)]",
    "assert f(2) in (4, 5)": "[f(2)]",
    "assert abs(f(2) - 4.0) < 1e-6": "[f(2)]",
    "assert math.isclose(f(2), 4, rel_tol=0.1)": "[f(2)]",
    "assert f(2)[0] == 4": "[f(2)[0]]",
    "assert set(f(2)) == {4}": "[[*f(2)]]",
    "assert len(f(2)) == 4": "[f(2)]",
    "assert isinstance(f(2), int)": "[f(2)]",
    "assert f(2).startswith('a')": "[f(2)]",
    "assert f(g(2), key=lambda x: -x) == 4": "[f(g(2), key=lambda x: -x)]",
    "expected = [4]\nassert f(2) == expected": "[f(2)]",
    "METADATA = {'a': 1}\ndef check(candidate):\n    assert candidate(2) == 4\n": "[f(2)]",
    "def check(candidate):\n    assert True, 'good'\n    assert candidate(2) == 4\ncheck(f)": "[f(2)]",
    "from solution import f\ndef test_f():\n    '''It squares.'''\n    assert f(2) == 4": "[f(2)]",
    "if __name__ == '__main__':\n    test()\nassert f(2) == 4": "[f(2)]",
}
NOT_CALLS = [
    "x = 5",
    "assert 1 == 1",
    "f(2)",
    "assert f(2) == [i for i in range(3)]",  # worked out by Python, but not here
    "assert all(x > 0 for x in f(2))",
    "assert isinstance(f(2), Node)",
    "assert f(2) is not f(2)",
    "assert f(2) == helper(2)",  # a function of the problem's own, which the program may have redefined
    "while True:\n    assert f(2) == 4",
    "def test_f():\n    for i in count():\n        assert f(i) == 1",
    "class TestF:\n    def test_f(self):\n        assert f(2) == 4",
    "assert re.fullmatch('a+', f(2))",
    "try:\n    f(2)\n    assert False\nexcept Exception:\n    pass",
    "import pytest\nwith pytest.raises(ValueError, match='(a+)+$'):\n    f(2)",
    "assert Node(1) == Node(1)",
    "assert f(2) == 4 if (y := 3) else False",
    "assert x.y is None or x.y.z == 3",
    "not python",
]


@pytest.mark.parametrize("source", CALLS)
def test_asserts_become_calls(source: str) -> None:
    turned = rewritten(source, "f")
    assert turned is not None and turned.expression == CALLS[source]


@pytest.mark.parametrize("source", NOT_CALLS)
def test_what_needs_more_is_left_as_it_is(source: str) -> None:
    assert rewritten(source, "f", frozenset({"helper"})) is None


def holds(turned: Rewritten, names: dict[str, Any]) -> bool:
    """What a trusted program's values make of a test. The real way is in test_forgery.py."""
    values = []
    if turned.expression is not None:
        listed = eval(turned.expression, names)  # noqa: S307  (written in this file)
        values = [listed[place] for place in turned.values]
    for claim in turned.claims:
        known = claim.known | {name: values[place] for name, place in claim.holes.items()}
        if not evaluate(claim.expression, known):
            return False
    for each in turned.raises:
        try:
            eval(each.expression, names)  # noqa: S307  (written in this file)
            return False
        except Exception as error:
            if type(error).__name__ not in each.exceptions:
                return False
    return True


SEQUENCES = [
    "xs = [3, 1]\nr = f(xs)\nassert r == [1, 3]\nassert xs == [3, 1]",
    "xs = [3, 1]\nassert f(xs) == sorted(xs)\nassert len(xs) == 2",
    "a, b = [2, 1], [1, 2]\nassert f(a) == b",
    "for xs, want in [([2, 1], [1, 2]), ([], [])]:\n    assert f(xs) == want",
    "for n in range(3):\n    assert f([n]) == [n]",
    "s = f([1])\ns.append(5)\nassert s == [1, 5]\ns.append(6)\nassert s == [1, 5, 6]",
    "import pytest\nwith pytest.raises(TypeError):\n    f(5)\nassert f([1]) == [1]",
    "import pytest\n@pytest.mark.parametrize('a,b', [([2, 1], [1, 2])])\ndef test_f(a, b):\n    assert f(a) == b",
    "n = 2\nm = n + 1\nassert f([m, n]) == [n, m] and n == 2",
]


@pytest.mark.parametrize("source", SEQUENCES)
def test_sequences_hold_for_the_right_program_and_not_for_a_wrong_one(source: str) -> None:
    turned = rewritten(source, "f")
    assert turned is not None
    assert holds(turned, {"f": sorted})
    wrong = {"f": lambda xs: [99]}
    assert not holds(turned, wrong)


def test_what_is_expected_never_goes_to_the_program() -> None:
    source = "secret = 'open sesame'\nn = 4\nassert f(n) == secret and f(n) != 'other'\nassert f(5) == 'third'"
    turned = rewritten(source, "f")
    assert turned is not None and turned.expression is not None
    assert not any(word in turned.expression for word in ("sesame", "other", "third"))
    assert "n := 4" in turned.expression


EXPECTED_SIDES = [
    "want = [1, 4, 9]\nassert f(3) == want",
    "want = [1, 4, 9]\nn = len(want)\nassert f(n) == want",
    "want = [1, 4, 9]\nassert f(len(want)) == want",
    "want = [[1], [4]]\nassert f(len(want[0])) == want",
    "want = [i * i for i in range(4)]\nassert f(4) == want",
    "want = ', '.join(['a', 'b'])\nassert f(4) == want",
    "for n, want in [(2, 4), (3, 9)]:\n    assert f(n) == want",
    "for n in range(3):\n    want = pow(n, 2, 7)\n    assert f(n) == want",
    "import math\nwant = math.factorial(5)\nassert f(5) == want",
    "import random\nwant = random.randint(1, 5)\nassert f(want) == want * 2",
    "want = [1, 4]\nright = f(2) == want\nassert right",
    "want = 4\nerror = abs(f(2) - want)\nassert error < 1e-6",
    "want, out = 4, []\nout.append(f(2) == want)\nassert out == [True]",
    "want, out = 4, []\nout.append(f(2))\nassert out == [want]",
    "want = 4\nassert f(2, key=lambda x: -x) == want",
]


@pytest.mark.parametrize("source", EXPECTED_SIDES)
def test_a_name_of_the_expected_side_is_not_told(source: str) -> None:
    turned = rewritten(source, "f")
    told = [turned.expression, *(each.expression for each in turned.raises)] if turned is not None else []
    assert not any(
        isinstance(part, ast.Name) and part.id == "want" for text in told for part in ast.walk(tree_of(text))
    )
    assert not any(word in str(text) for text in told for word in ("1, 4", "pow", "factorial", "randint", "==", "abs"))


def tree_of(expression: str | None) -> ast.AST:
    return ast.parse(str(expression))


def test_pythons_own_functions_are_applied_here() -> None:
    """A program that has replaced `sorted` or `len` in its process must not decide what they say."""
    for source in ("xs = [2, 1]\nassert f(xs) == sorted(xs)", "assert len(f(2)) == 3", "assert bool(f(2)) is True"):
        turned = rewritten(source, "f")
        assert turned is not None and turned.expression is not None
        assert not any(name in turned.expression for name in ("sorted", "len", "bool"))


def test_claims_about_objects_stay_with_the_object() -> None:
    turned = rewritten("s = Stack()\ns.push(1)\nassert len(s) == 1\nassert s.pop() == 1", "f")
    assert turned is not None and "s.__len__()" in str(turned.expression)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("-1", -1), ("1 + 2 * 3", 7), ("[1, *(2, 3)]", [1, 2, 3]), ("{'a': 1}['a']", 1), ("'abc'[::-1]", "cba"),
        ("1 < 2 < 3", True), ("1 < 2 > 3", False), ("not []", True), ("1 and 2 or 3", 2), ("3 if 0 else 4", 4),
        ("sorted([2, 1], reverse=True)", [2, 1]), ("math.isclose(1, 1.1, abs_tol=0.2)", True),
        ("isinstance(1, (int, str))", True), ("isinstance('a', int | str)", True), ("type(1) == int", True),
        ("set()", set()), ("'a' in 'abc'", True), ("2 ** 10", 1024), ("7 % 3", 1), ("{1} | {2}", {1, 2}),
        ("'A,b'.lower().split(',')", ["a", "b"]), ("list({'a': 1}.keys())", ["a"]),
        ("1.0 == pytest.approx(1.0000001)", True),
        ("[0.1, 0.2] == pytest.approx([0.1, 0.3])", False), ("1 is 1", True), ("True is 1", False),
        ("max(1, 3)", 3), ("sum([1, 2], 3)", 6), ("list(zip([1], [2]))", [(1, 2)]), ("round(1.256, 2)", 1.26),
    ],
)  # fmt: skip
def test_expressions_are_worked_out_as_python_does(expression: str, value: Any) -> None:
    node = parse_expression(expression)
    assert node is not None and is_within(node, set())
    assert evaluate(node, {}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')", "open('x')", "().__class__", "[].append(1)", "eval('1')", "(lambda: 1)()", "[x for x in y]",
        "'%9999999d' % 1", "'{:9999999}'.format(1)", "f'{1:999999}'", "getattr(1, 'real')", "x.y", "print(1)",
    ],
)  # fmt: skip
def test_nothing_else_is_worked_out(expression: str) -> None:
    node = parse_expression(expression)
    assert node is not None
    with pytest.raises(CannotEvaluateError):
        evaluate(node, {})


@pytest.mark.parametrize(
    "expression",
    ["9 ** 9 ** 9", "'a' * 10 ** 9", "[0] * 10 ** 9", "1 << 10 ** 9", "range(10 ** 9)", "1 / 0", "[1][5]", "int('x')"],
)
def test_what_would_take_forever_or_fails_is_an_error(expression: str) -> None:
    node = parse_expression(expression)
    assert node is not None
    with pytest.raises(CannotEvaluateError):
        evaluate(node, {})


def test_a_test_as_a_whole_is_called_and_knows_what_it_needs() -> None:
    source = "from solution import f\nimport os\ndef test_a():\n    y = g(1)\n    assert [f(x) for x in [y]]\n"
    whole = runnable(source, "f")
    assert whole is not None and whole.endswith("test_a()\n") and "solution" not in whole
    assert free_names(whole) == {"f", "g"}
    checked = runnable("def check(candidate):\n    assert [candidate(x) for x in (1, 2)]", "f")
    assert checked is not None and checked.endswith("check(f)\n")
    ast.parse(whole)
    in_class = runnable("class TestF:\n    def test_one(self):\n        assert [f(x) for x in (1, 2)]", "f")
    assert in_class is not None and in_class.endswith("TestF().test_one()\n")
    assert runnable("x = 1", "f") is None  # nothing in it can fail
    needs_pytest = "import pytest\ndef test_f():\n    with pytest.raises(ValueError, match='a+'):\n        f(1)"
    assert runnable(needs_pytest, "f") is None
    assert runnable("def test_f(tmp_path):\n    assert [f(x) for x in tmp_path]", "f") is None
    unused = runnable("import pytest\nassert [f(x) for x in (1, 2)]", "f")
    assert unused is not None and "pytest" not in unused
    matched = runnable("assert re.fullmatch('a+', f(2))", "f")
    assert matched is not None and matched.startswith("import re\n") and free_names(matched) == {"f"}


def test_a_set_of_items_made_to_collide_is_an_error() -> None:
    colliding = [number * (2**61 - 1) for number in range(20_000)]
    for expression in ("set(xs)", "frozenset(xs)", "dict(zip(xs, xs))"):
        node = parse_expression(expression)
        assert node is not None
        with pytest.raises(CannotEvaluateError):
            evaluate(node, {"xs": colliding})
        assert len(evaluate(node, {"xs": [1] * 20_000 + list(range(20_000))})) == 20_000
