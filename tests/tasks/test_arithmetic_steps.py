"""Arithmetic worked out line by line: solutions are right, wrong ones are refused, splits do not leak."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from rl4dlm.grading.expression import evaluate
from rl4dlm.tasks import expressions, load_task
from rl4dlm.tasks.arithmetic_steps import steps_right
from rl4dlm.tasks.expressions import Expression, Operation

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: load_task("arithmetic_steps", size=256).rows(split) for split in SPLITS}


def read(text: str) -> Expression:
    """The tree of an expression, read by a parser that shares nothing with the task."""
    tokens = re.findall(r"\d+|[-+*/()]", text)

    def atom() -> Expression:
        token = tokens.pop(0)
        if token != "(":
            return int(token)
        found = binary("+-")
        tokens.pop(0)
        return found

    def binary(symbols: str) -> Expression:
        found = binary("*/") if symbols == "+-" else atom()
        while tokens and tokens[0] in symbols:
            found = Operation(tokens.pop(0), found, binary("*/") if symbols == "+-" else atom())
        return found

    return binary("+-")


def shuffled(rng: random.Random, expression: Expression) -> Expression:
    """The same expression with sums and products in another order and grouping."""
    if isinstance(expression, int):
        return expression
    symbol, left, right = expression
    left, right = shuffled(rng, left), shuffled(rng, right)
    if symbol in "+*":
        if isinstance(right, Operation) and right.symbol == symbol and rng.random() < 0.5:
            return Operation(symbol, Operation(symbol, left, right.left), right.right)  # a+(b+c): (a+b)+c
        return Operation(symbol, right, left) if rng.random() < 0.5 else Operation(symbol, left, right)
    if isinstance(right, Operation) and right.symbol == symbol:
        return Operation(symbol, Operation("+" if symbol == "-" else "*", left, right.right), right.left)  # (a+c)-b
    return Operation(symbol, left, right)


def test_solutions_are_worked_out_one_operation_at_a_time(rows: dict[str, list[dict]]) -> None:
    task = load_task("arithmetic_steps")
    for row in (row for split in SPLITS for row in rows[split]):
        assert row["prompt"] == f"{row['expression']}\n"
        *lines, last = [row["expression"], *row["solution"].split("\n")]
        value, literals = evaluate(row["expression"])
        assert 3 <= len(literals) <= 5 and all(1 <= number <= 12 for number in literals) and 0 <= value <= 99
        assert last == f"\\boxed{{{value}}}" and row["answer"] == str(value)
        assert [evaluate(line).value for line in lines] == [value] * len(lines)
        assert [len(evaluate(line).literals) for line in lines] == list(range(len(literals), 1, -1))
        assert task.check(row["solution"], row) is True and steps_right(row["solution"], row["expression"]) == 1.0


def test_a_changed_answer_or_line_is_not_accepted(rows: dict[str, list[dict]]) -> None:
    task = load_task("arithmetic_steps")
    for row in rows["test"]:
        work, right = row["solution"].rsplit("\n", 1)[0], int(row["answer"])
        for wrong in (right + 1, right - 1, -right - 1, 10 * right + 1):
            assert task.check(f"{work}\n\\boxed{{{wrong}}}", row) is False
        for text in (work, f"{work}\n", f"{work}\n\\boxed{{}}", f"{work}\n\\boxed{{{right}", "", row["prompt"] * 2):
            assert task.check(text, row) is False
        lines = work.split("\n")
        for i, line in enumerate(lines):
            changed = [*lines[:i], f"{line}+1", *lines[i + 1 :]]
            assert steps_right("\n".join(changed), row["expression"]) == (len(lines) - 1) / len(lines)
            assert steps_right("\n".join([*lines[:i], *lines[i + 1 :]]), row["expression"]) < 1
            assert steps_right("\n".join([*lines[: i + 1], *lines[i:]]), row["expression"]) < 1


def test_the_answer_is_read_as_gsm8k_is(rows: dict[str, list[dict]]) -> None:
    task, gsm8k, row = load_task("arithmetic_steps"), load_task("gsm8k"), {"answer": "9"}
    texts = [r"\boxed{9}", r"\boxed{9} 7", r"7+2\boxed{9}", "<answer>9</answer>8", "<answer>9", r"\boxed{8}\boxed{9}",
             "9", "9.0", r"\boxed{8}", r"\boxed{9}\boxed{8}", "<answer></answer>", "nine"]  # fmt: skip
    assert [task.check(text, row) for text in texts] == [gsm8k.check(text, row) for text in texts]
    assert [task.check(text, row) for text in texts] == [True] * 8 + [False] * 4
    assert task.check("9", {}) is None and task.check("9", {"answer": "x"}) is None


def test_no_expression_is_in_two_splits_in_any_order(rows: dict[str, list[dict]]) -> None:
    rng = random.Random(0)
    keys = {
        split: {
            expressions.canonical(shuffled(rng, read(row["expression"])))
            for seed in range(3)
            for row in load_task("arithmetic_steps", size=1500 if split == "train" else 200, seed=seed).rows(split)
        }
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        assert not keys[first] & keys[second]
    for split in ("validation", "test"):
        assert len({expressions.canonical(read(row["expression"])) for row in rows[split]}) == 256


def test_canonical_is_the_same_in_every_order_and_grouping() -> None:
    rng = random.Random(1)
    for _ in range(500):
        numbers = [rng.randint(1, 9) for _ in range(rng.randint(2, 6))]
        expression = expressions.draw(rng, numbers, "+-*/")
        other = shuffled(rng, expression)
        assert expressions.canonical(other) == expressions.canonical(expression)
        assert read(expressions.written(expression)) == expression  # text and tree say the same
    same = ["3-(4-5)", "3-4+5", "5+(3-4)", "5-(4-3)"]
    assert len({expressions.canonical(read(text)) for text in same}) == 1
    different = ["3-4-5", "3-4+5", "3+4-5", "3*4+5", "3*(4+5)", "3+4*5", "3*4*5", "3*5/4", "3/(4*5)", "3*4/5"]
    assert len({expressions.canonical(read(text)) for text in different}) == len(different)


def test_values_are_natural_and_bounded() -> None:
    for text, most, value in [
        ("3-4", 9, None), ("3-4+5", 9, None), ("5-4+3", 9, 4), ("6/4", 9, None), ("6/3", 9, 2), ("6/(3-3)", 9, None),
        ("5*2-3", 9, None), ("5*2-3", 10, 7), ("0*(9+9)", 9, None),
    ]:  # fmt: skip
        assert expressions.value(read(text), most) == value


@pytest.mark.parametrize(
    ("options", "prompt", "solution"),
    [({}, 21, 44), ({"symbols": "+-*/"}, 21, 44), ({"max_operations": 3}, 16, 28), ({"max_operations": 2}, 11, 17)],
)
def test_texts_fit_the_canvases_they_are_made_for(options: dict, prompt: int, solution: int) -> None:
    lengths = [(len(row["prompt"]), len(row["solution"]) + 1) for row in _rows(**options)]
    assert max(lengths)[0] <= prompt and max(length for _, length in lengths) <= solution
    assert len({length for _, length in lengths}) > 3  # where to end has to be decided


def _rows(**options: object) -> list[dict]:
    return load_task("arithmetic_steps", size=3000, **options).rows("train")


def test_difficulty_is_set() -> None:
    (row, *_) = load_task(
        "arithmetic_steps", size=9, min_operations=6, max_operations=6, max_number=3, symbols="+"
    ).rows("train")
    assert row["expression"].count("+") == 6 and set(re.findall(r"\d+", row["expression"])) <= {"1", "2", "3"}
    assert {row["expression"].count("*") for row in _rows(symbols="+-")} == {0}
    counts = [len(re.findall(r"[-+*]", row["expression"])) for row in _rows()]
    assert all(850 < counts.count(number) < 1150 for number in (2, 3, 4))


def test_same_options_give_the_same_rows_and_another_seed_gives_others() -> None:
    first, again, other = (load_task("arithmetic_steps", size=50, seed=seed).rows("test") for seed in (0, 0, 1))
    assert first == again != other
    assert first == load_task("arithmetic_steps", size=100).rows("test")[:50]


def test_more_rows_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"size=500; after \d+ rows there are hardly more test expressions of 2 to 2"):
        load_task("arithmetic_steps", size=500, max_operations=2, max_number=5).rows("test")
