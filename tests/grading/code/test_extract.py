"""Which text of a completion is its program, and that finding it is cheap whatever the text is."""

from __future__ import annotations

import ast

import pytest

from rl4dlm.grading.code.extract import extract_program
from rl4dlm.grading.code.parse import parse

BODY = "def f(x):\n    return x"
PREFIX = 'from typing import List\n\ndef f(x: int) -> int:\n    """Adds one."""\n'


def fenced(code: str, label: str = "python") -> str:
    return f"```{label}\n{code}\n```"


@pytest.mark.parametrize(
    ("completion", "source"),
    [
        (fenced(BODY), BODY),
        (f"Text.\n{fenced(BODY)}\nMore text.", BODY),
        (fenced(BODY, ""), BODY),
        (fenced(BODY, "Python3"), BODY),
        (f"```python\n{BODY}```", BODY),
        (f"<answer>\n{fenced(BODY)}\n</answer>", BODY),
        (f"{fenced('def f(x):  pass')}\n<answer>\n{fenced(BODY)}\n</answer>", BODY),
        (f"<answer>\n{BODY}\n</answer>", BODY),
        (f"{fenced('def f(x):  pass')}\nor better\n{fenced(BODY)}", BODY),
        (f"{fenced(BODY)}\nthen\n```python\ndef f(x):\n    ret", BODY),  # the last one that is complete
        (f"{fenced(BODY)}\nwhich prints\n{fenced('3 apples', 'text')}", BODY),
        (f"{fenced(BODY)}\nUse it:\n{fenced('print(f(1))')}", BODY),  # an example does not define it
        (BODY, BODY),
        (f"\n\n{BODY}\n", BODY),
        (f"{BODY}\n[DONE]\nProblem 2: ```python\ndef f(x): pass\n```", BODY),
        (f"{BODY}<|im_end|>", BODY),
        (f"{BODY}\n```\nIt returns x.", BODY),  # the prompt has opened the fence
        ("def f(x):\n    return x\n    # done", "def f(x):\n    return x\n    # done"),
        ("```python\n    def f(x):\n        return x\n```", BODY),  # indented as a whole
    ],
)
def test_the_program_is_found(completion: str, source: str) -> None:
    found = extract_program(completion, entry_point="f")
    assert found.source == source and found.reason == ""


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "no_code"),
        ("   \n", "no_code"),
        ("I cannot do that.", "syntax"),
        (f"```python\n{BODY}", "no_code"),  # never closed
        (fenced("def f(x)\n    return x"), "syntax"),
        (fenced("3 apples", "text"), "no_code"),
        (fenced(""), "no_code"),
    ],
)
def test_a_completion_without_a_program(completion: str, reason: str) -> None:
    assert extract_program(completion, entry_point="f") == (None, reason)


@pytest.mark.parametrize(
    "completion",
    [
        "    return x + 1",
        "    return x + 1\n",
        "    y = x\n    return y + 1\n\nprint(f(2))\nprint(",  # goes on, and is cut where its indent ends
        "    return x + 1\n\ndef test(:",
        "return x + 1",
        "y = x\nreturn y + 1",
        "y = x\n    return y + 1",  # the first line has lost its indent
        fenced("    return x + 1"),
        fenced("return x + 1"),
        f"    return x + 1\n{'```'}\nwhere x is a number",
    ],
)
def test_a_body_goes_on_from_the_signature(completion: str) -> None:
    source = extract_program(completion, prefix=PREFIX, entry_point="f").source
    assert source is not None and source.startswith(PREFIX.rstrip())
    names: dict[str, object] = {}
    exec(source.replace("print(f(2))", ""), names)  # noqa: S102  (written above)
    assert names["f"](2) == 3  # type: ignore[operator]


def test_a_whole_function_replaces_the_signature() -> None:
    found = extract_program(fenced(BODY), prefix=PREFIX, entry_point="f")
    assert found.source == BODY
    assert extract_program(fenced(BODY), prefix=PREFIX).source == BODY  # the signature says the name
    assert extract_program(fenced("y = 2"), prefix="import math\n").source == "import math\ny = 2"


HOSTILE = {
    "minus": "-" * 60_000 + "1",
    "brackets": "(" * 60_000,
    "attributes": "a" + ".b" * 30_000,
    "sums": "1+" * 30_000 + "1",
    "else_if": "if x: pass\n" + "elif x: pass\n" * 4_000,
    "lambdas": "lambda:" * 9_000 + "1",
    "dotted_import": "import " + "a." * 30_000 + "a",
    "fences": "```" * 20_000,
    "open_fences": "```python\n" * 6_000,
    "nul": "def f():\n    return '\0'",
    "surrogate": "x = '\ud800'",
    "conditionals": "1 if x else " * 5_000 + "1",
    "long": "x = 1\n" * 40_000,
    "tags": "<answer>" * 8_000 + "</answer>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_no_program_and_breaks_nothing(name: str) -> None:
    text = HOSTILE[name]
    assert extract_program(text).source is None
    extract_program(fenced(text), prefix=PREFIX, entry_point="f")  # its first line may be a body


def test_a_tree_is_shallow_enough_to_walk() -> None:
    assert parse("x = " + "[" * 90 + "]" * 90) is not None
    assert parse("1+" * 300 + "1") is not None
    deep = parse("1+" * 900 + "1")
    assert deep is None or ast.dump(deep)


def test_a_mark_of_the_end_within_a_block_is_the_program_s() -> None:
    code = "def f():\n    return '[DONE]'"
    assert extract_program(f"```python\n{code}\n```\n[DONE]\n```python\nx = 1\n```").source == code
    assert extract_program("```python\nx = 1\n[DONE] and more").source is None


def test_a_label_may_go_on() -> None:
    assert extract_program("```python title=a.py\nx = 1\n```\n```\n1\n```").source == "x = 1"
