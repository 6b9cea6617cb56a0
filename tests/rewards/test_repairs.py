"""Faults of rewards found in use: the ids are those of the repair list."""

from __future__ import annotations

import random
import re
import time
from functools import partial
from typing import Any

import numpy as np
import pytest

from rl4dlm.grading import available_rewards, load_reward
from rl4dlm.grading.code.extract import extract_program
from rl4dlm.tasks import load_task
from rl4dlm.training.checks import checked_rewards


@pytest.mark.parametrize(
    ("answer", "right"),
    [("$18$", 2.0), ("18 dollars", 2.0), (r"$\\boxed{18}$", 2.0), ("The answer is 18.", 2.0), ("17 or 18", 0.0),
     ("1 8", 0.0), ("100-82", 0.0)],
)  # fmt: skip
def test_a4_gsm8k_reads_answers_as_the_checker_does(answer: str, right: float) -> None:
    answer = answer.replace("\\\\", "\\")
    reward: Any = load_reward("gsm8k:correctness")
    assert reward(prompts=[""], completions=[f"<answer>{answer}</answer>"], answer=["18"]) == [right]


def test_a7_countdown_reads_spellings_of_operators_and_brackets() -> None:
    reward: Any = load_reward("countdown")
    texts = ["4⋅6⋅8", r"\(4*6*8\)", r"\left(4*6\right)*8", "4+6+8"]
    rows = [f"<answer>{text}</answer>" for text in texts]
    scores = reward(prompts=[""] * 4, completions=rows, numbers=[[4, 6, 8]] * 4, target=[192] * 4)
    assert scores == [1.0, 1.0, 1.0, 0.1]


def test_a6_names_of_rewards_are_distinct() -> None:
    first, second = (lambda completions, **_: [0.0]), (lambda completions, **_: [1.0])
    named = [load_reward("gsm8k:correctness"), load_reward("math:correctness"), first, second, partial(first)]
    names = [f.__name__ for f in checked_rewards(named) or []]
    assert len(set(names)) == 5 and names[:2] == ["gsm8k:correctness", "math:correctness"]


@pytest.mark.parametrize("value", [1e300, 3e38, -3e38, 10**400, 1.1e6])
def test_r2_large_rewards_are_refused_by_name(value: float) -> None:
    def mine(completions: list[str], **_: Any) -> list[float]:
        return [value]

    (reward,) = checked_rewards([mine]) or []
    with pytest.raises(ValueError, match="mine"):
        reward(prompts=[""], completions=[""])


def test_a3_an_empty_box_is_no_answer() -> None:
    reward: Any = load_reward("math:correctness")
    text = r"<reasoning>we put it in \boxed{}</reasoning><answer>8</answer>"
    assert reward(prompts=[""], completions=[text], answer=["8"]) == [2.0]


@pytest.mark.parametrize("name", ["gsm8k:soft_format", "gsm8k:strict_format"])
def test_a8_formats_are_read_in_linear_time(name: str) -> None:
    reward: Any = load_reward(name)
    text = "<reasoning>\n" + "x\n</reasoning>\n<answer>\n" * 40_000
    started = time.perf_counter()
    assert reward(prompts=[""], completions=[text]) == [0.0]
    assert time.perf_counter() - started < 2


# --- A5: a column says what it says, whatever type its reader gave it -------------------------------------------------


@pytest.mark.parametrize("gold", ["18", 18, 18.0, np.int64(18), "3*6=18\n#### 18", " 18 "])
def test_a5_a_gold_number_of_any_type(gold: Any) -> None:
    assert load_reward("gsm8k:correctness")(["?"], ["<answer>18</answer>"], answer=[gold]) == [2.0]
    assert load_task("gsm8k").check("<answer>18</answer>", {"answer": gold}) is True
    if "#" not in str(gold):
        assert load_reward("math:correctness")(["?"], [r"\boxed{18}"], answer=[gold]) == [2.0]


@pytest.mark.parametrize("gold", [0, 0.0, "0"])
def test_a5_a_gold_of_zero_is_an_answer(gold: Any) -> None:
    for name in ("gsm8k:correctness", "math:correctness"):
        assert load_reward(name)(["?"] * 2, ["<answer>0</answer>", "<answer>1</answer>"], answer=[gold] * 2) == [
            2.0,
            0.0,
        ]
    assert load_task("math").check("<answer>0</answer>", {"answer": gold}) is True


@pytest.mark.parametrize("gold", [None, float("nan"), ""])
def test_a5_no_gold_cannot_be_scored(gold: Any) -> None:
    for name in ("gsm8k:correctness", "math:correctness"):
        assert load_reward(name)(["?"], ["<answer>0</answer>"], answer=[gold]) == [None]


@pytest.mark.parametrize("target", [24, "24", 24.0, np.int64(24)])
@pytest.mark.parametrize("numbers", [[4, 6], "[4, 6]", "4 6", ["4", "6"], np.array([4, 6])])
def test_a5_countdown_columns_of_any_type(target: Any, numbers: Any) -> None:
    text = "<answer>4*6</answer>"
    assert load_reward("countdown")(["?"], [text], numbers=[numbers], target=[target]) == [1.0]
    assert load_task("countdown").check(text, {"numbers": numbers, "target": target}) is True


def test_a5_a_puzzle_that_lost_its_zeros() -> None:
    puzzle, solution = "0234041221434321", "1234341221434321"
    shown = "<answer>1234341221434321</answer>"
    found = load_reward("sudoku")(["?"], [shown], puzzle=[int(puzzle)], solution=[int(solution)])
    assert found == load_reward("sudoku")(["?"], [shown], puzzle=[puzzle], solution=[solution]) == [1.0]
    assert load_task("sudoku").check(shown, {"puzzle": int(puzzle)}) is True


def test_a7_reward_and_checker_of_countdown_read_the_same() -> None:
    row = {"numbers": [4, 6, 8], "target": 192}
    for text in ("<answer>4*6*8</answer> <answer>", "<answer>4*6*8</answer><answer> </answer>", r"so \boxed{4*6*8}"):
        (paid,) = load_reward("countdown")(["?"], [text], numbers=[row["numbers"]], target=[row["target"]])
        assert paid == 1.0 and load_task("countdown").check(text, row) is True, text


# --- A8: linear in the text -------------------------------------------------------------------------------------------

PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "x", "\t", "\r"]


def test_a8_the_soft_format_of_d1_is_its_regular_expression() -> None:
    pattern, rng = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"), random.Random(0)
    texts = ["<reasoning>" + "".join(rng.choices(PIECES, k=rng.randint(0, 9))) for _ in range(20_000)]
    expected = [0.5 if pattern.match(text) else 0.0 for text in texts]
    assert load_reward("gsm8k:soft_format_compat")(["?"] * len(texts), texts) == expected
    assert 100 < expected.count(0.5) < 19_000


UNITS = [
    "</reasoning><answer>", "<answer>", "</answer>", "</reasoning>\n<answer>\n", r"\boxed{", "{", "(", "1", " ", "\n",
]  # fmt: skip


def is_linear(read: Any) -> None:
    """Compares texts of 50,000 and of 400,000 characters."""

    def seconds(length: int) -> float:
        started = time.process_time()
        read(length)
        return time.process_time() - started

    seconds(1000)
    short, long = seconds(50_000), seconds(400_000)
    assert long < 0.25 or long < 24 * short, (short, long)  # quadratic would be 64 times


@pytest.mark.parametrize(
    "name", [name for name in available_rewards() if not name.startswith(("speed", "reasoning_gym"))]
)
@pytest.mark.parametrize("unit", UNITS)
def test_a8_every_reader_is_linear(name: str, unit: str) -> None:
    columns = {
        "answer": ["5"], "numbers": [[2, 3]], "target": [5], "puzzle": ["1040002001022000"],
        "solution": ["1243342141322314"], "expression": ["1+2*2"],
        "problem": ['{"tests": [{"call": "f(2)", "expected": "4"}], "entry_point": "f"}'],
    }  # fmt: skip
    reward = load_reward(name)
    is_linear(lambda length: reward(["?"], ["<reasoning>" + unit * (length // len(unit))], **columns))


@pytest.mark.parametrize(
    "unit",
    [
        "\n",
        " ",
        "\t",
        " \n",
        "def\n",
        "async ",
        "f ",
        "f\n\n\n\n\n\n\n\n",
        "def f",
        ".a",
        "x.",
        "# ",
        "(",
        "[DONE]",
        "```",
    ],
)
def test_a8_a_program_is_found_in_linear_time(unit: str) -> None:
    for prefix, wanted in (("", None), ("", "f"), ("def f(x):", None), ("def f(x):", "g")):
        for label in ("python", ""):

            def read(length: int, label: str = label, prefix: str = prefix, wanted: str | None = wanted) -> None:
                text = f"```{label}\n{unit * (length // len(unit))}\n```\n"
                extract_program(text, prefix=prefix, entry_point=wanted)

            is_linear(read)
            started = time.process_time()
            read(60_000)  # as long as what is still parsed
            assert time.process_time() - started < 2
