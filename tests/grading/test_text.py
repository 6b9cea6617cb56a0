"""Answers are found where the formats put them, and numbers are read exactly."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from rl4dlm.grading.text import (
    answer_blocks,
    answer_or_text,
    completion_texts,
    hash_answer,
    last_answer_block,
    last_boxed,
    last_number,
    parse_number,
    score_rows,
    total,
)

_PIECES = st.lists(st.sampled_from(["<answer>", "</answer>", "a", "\n", "<answer", "5"]), max_size=12).map("".join)


@given(_PIECES)
def test_blocks_are_those_of_the_regular_expression(text: str) -> None:
    assert list(answer_blocks(text)) == re.findall("<answer>(.*?)</answer>", text, re.DOTALL)


@given(_PIECES)
def test_open_ended_answer_is_the_last_piece_of_a_split(text: str) -> None:
    assert answer_or_text(text) == text.split("<answer>")[-1].split("</answer>")[0].strip()


def test_last_answer_block() -> None:
    assert last_answer_block("<answer>1</answer> <answer>\n2\n</answer> <answer>3") == "2"
    assert last_answer_block("<answer>1") is None


@pytest.mark.parametrize(
    ("text", "answer"), [("a\n#### 1,000\n", "1,000"), ("# 5", None), ("#### 1 #### 2", "1"), ("####", "")]
)
def test_hash_answer(text: str, answer: str | None) -> None:
    assert hash_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"), (r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed 7$ x", "7"), ("7", None),
        (r"\boxed{3} \boxed{4", "3"), (r"\boxed{\boxed{8}}", "8"), (r"}\boxed {9}", "9"), (r"\boxed{", None),
    ],
)  # fmt: skip
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42), (" -42. ", -42), ("1,234,567", 1234567), ("$3.50", Fraction(7, 2)), ("-$3", -3), ("50%", 50),
        (r"\boxed{12}", 12), (r"\$1{,}", None), ("1,23", None), ("4²", None), ("٣", None), ("", None), (".", None),
        ("1 2", None), ("forty", None), ("1e5", None), ("1/2", None), ("9" * 100_000, None), (".5", Fraction(1, 2)),
    ],
)  # fmt: skip
def test_parse_number(text: str, number: Fraction | int | None) -> None:
    assert parse_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_thousands_commas_do_not_change_a_number(number: int) -> None:
    assert parse_number(f"{number:,}") == number == parse_number(str(number))


def test_last_number() -> None:
    assert last_number("12 apples and 1,300 pears cost -4.50 dollars") == Fraction(-9, 2)
    assert last_number("none") is None


def test_completions_come_as_text_or_as_messages() -> None:
    chat = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": None}]]
    assert completion_texts(["a", ""]) == completion_texts(chat) == ["a", ""]
    with pytest.raises(TypeError, match="int"):
        completion_texts([3])


def test_rows_without_a_value_are_not_scored() -> None:
    assert score_rows("r", lambda text, gold: float(text == gold), ["1", "2", "3"], {"gold": ["1", None, "4"]}) == [
        1.0,
        None,
        0.0,
    ]
    assert total([1.0, None], [0.5, 0.5]) == [1.5, None]


def test_missing_or_short_column_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="'gold'"):
        score_rows("r", lambda text, gold: 0.0, ["1"], {"gold": None})
    with pytest.raises(ValueError, match="'gold' has 1 values for 2"):
        score_rows("r", lambda text, gold: 0.0, ["1", "2"], {"gold": ["1"]})
