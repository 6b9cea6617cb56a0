"""Published forms of tests become tests of their own, and nothing is run to get there."""

from __future__ import annotations

from rl4dlm.tasks.code import sources

CHECK = '''
METADATA = {"author": "x"}

def check(candidate):
    """Some tests."""
    assert candidate(2) == 4
    assert True, "prints if there is an error"
    assert abs(candidate(0.5) - 0.25) < 1e-6, "near"
'''

PLUS = """
import numpy as np

def assertion(out, exp, atol):
    assert out == exp

def check(candidate):
    inputs = [[2, 'a'], [-1, {'k': (1, 2)}]]
    results = [4, [1.5, None]]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""


def test_assertions_of_a_check_function_become_tests() -> None:
    assert sources.check_function(CHECK, "square") == [
        {"source": "assert square(2) == 4"},
        {"source": "assert abs(square(0.5) - 0.25) < 1e-06, 'near'"},
    ]


def test_a_check_function_that_does_more_stays_whole() -> None:
    loop = "def check(candidate):\n    for n in range(3):\n        assert candidate(n) == n * n\n"
    assert sources.check_function(loop, "square") == [{"source": f"{loop}\ncheck(square)"}]
    helped = f"def near(a, b):\n    return a == b\n{CHECK}"
    (test,) = sources.check_function(helped, "square")
    assert test["source"].endswith("check(square)") and "def near" in test["source"]
    (test,) = sources.check_function("def check(", "square")
    assert test["source"].endswith("check(square)")


def test_inputs_and_results_of_literals_become_calls_with_expected_values() -> None:
    calls = [
        {"call": "f(2, 'a')", "expected": "4"},
        {"call": "f(-1, {'k': (1, 2)})", "expected": "[1.5, None]"},
    ]
    assert sources.check_function(PLUS, "f") == calls
    outside = (
        "inputs = [[1], [2]]\nresults = [1, 4]\nfor inp, exp in zip(inputs, results):\n    assert f(*inp) == exp\n"
    )
    assert sources.inputs_and_results(outside, "f") == [
        {"call": "f(1)", "expected": "1"},
        {"call": "f(2)", "expected": "4"},
    ]
    computed = outside.replace("[1, 4]", "[g(1), g(2)]")
    assert sources.inputs_and_results(computed, "f") == [{"source": computed}]


def test_functions_of_pytest_become_tests_and_fixtures_are_left_out() -> None:
    source = """
import math
import pytest
from solution import f

LIMIT = 3

def test_values():
    assert f(1) == 1
    assert f(LIMIT) == 9

def test_more():
    for n in range(3):
        assert f(n) == n ** 2

@pytest.mark.parametrize("n, wanted", [(1, 1), (2, 4)])
def test_rows(n, wanted):
    found = f(n)
    assert found == wanted

@pytest.fixture
def number():
    return 3

def test_with_a_fixture(number):
    assert f(number) == 9

def test_raises():
    with pytest.raises(ValueError):
        f(None)

if __name__ == "__main__":
    pytest.main()
"""
    tests = [test["source"] for test in sources.pytest_functions(source)]
    assert len(tests) == 6
    assert all("LIMIT = 3" in test and "import math" in test and "solution" not in test for test in tests)
    assert not any("__main__" in test or "test_with_a_fixture" in test for test in tests)
    assert [test.rsplit("\n", 1)[1] for test in tests] == [
        "assert f(1) == 1",
        "assert f(LIMIT) == 9",
        "test_more()",
        "test_rows(1, 1)",
        "test_rows(2, 4)",
        "test_raises()",
    ]
    assert sources.pytest_functions("def test(") == []


def test_methods_of_test_classes_are_tests_too() -> None:
    source = """
from solution import f

class TestF:
    LIMIT = 2

    def test_one(self):
        assert f(1) == 1

    def test_limit(self):
        assert f(self.LIMIT) == 4

    def test_fixture(self, number):
        assert f(number) == 9
"""
    first, second = (test["source"] for test in sources.pytest_functions(source))
    assert first == "assert f(1) == 1"
    assert second.startswith("class TestF:") and second.endswith("TestF().test_limit()")


def test_pytest_is_replaced_where_a_test_is_run_as_a_whole() -> None:
    head = "import pytest\nfrom solution import f\n\n"
    (test,) = sources.pytest_functions(f"{head}def test_a():\n    with pytest.raises(ValueError):\n        f(-1)\n")
    assert test["source"].startswith("import pytest\n")  # which the grader reads, and does not run
    body = "    while True:\n        with pytest.raises(ValueError):\n            f(-1)\n        break\n"
    (test,) = sources.pytest_functions(f"{head}def test_b():\n{body}")
    assert "import pytest" not in test["source"] and "class pytest:" in test["source"]


def test_names_and_signatures_are_read_from_source() -> None:
    assert sources.entry_point_of(["assert set(f(1, 2)) == {1}"]) == "f"
    assert sources.entry_point_of(["x ="]) is None
    program = "def g():\n    pass\n\ndef f(a, b=2, *c, d: int):\n    return a\n"
    assert sources.signature_of(program, "f") == "f(a, b=2, *c, d: int)"
    assert sources.signature_of(program, "h") == "" == sources.signature_of("def", "f")


def test_a_prompt_is_taken_apart() -> None:
    prompt = (
        "from typing import List\n\ndef helper(x):\n    return x\n\n"
        'def f(a: List[int]):\n    """ Sum of a list.\n    >>> f([1])\n    1\n    """\n'
    )
    assert sources.before_function(prompt, "f") == "from typing import List\n\ndef helper(x):\n    return x"
    assert sources.docstring_of(prompt, "f") == "Sum of a list."
    assert sources.docstring_of("def f(a):\n", "f") == "def f(a):\n"
