"""The MATH benchmark's comparison of strings, in the cases its rules name."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from rl4dlm.grading.math_strings import is_equiv, last_boxed_only_string, remove_boxed, strip_string

_LATEX = st.lists(
    st.sampled_from(
        [r"\frac", r"\sqrt", "{", "}", "1", "x", "/", "=", r"\text{ ", ".", " ", r"\boxed{", r"\boxed ", "$"]
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\tfrac12", r"\frac{1}{2}"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\frac1{72}", r"\frac{1}{72}"),
        ("1/2", r"\frac{1}{2}"),
        (".5", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"), ("x = 5", "5"), ("abc=5", "abc=5"), (r"5\text{ cm}", "5"),
        (r"50\%", "50"),
        (r"\$5", "5"), (r"\sqrt3", r"\sqrt{3}"), (r"\left(1,\!2\right)", "(1,2)"), (r"90^\circ", "90"),
        ("1 000\n", "1000"),
    ],
)  # fmt: skip
def test_normal_form(text: str, normal: str) -> None:
    assert strip_string(text) == normal


@pytest.mark.parametrize(
    ("text", "error"),
    [("a/b", ValueError), (r"\frac", IndexError), (r"\sqrt", IndexError), (r"5\text{ a}\text{ b}", AssertionError)],
)
def test_no_normal_form_means_comparison_of_the_strings_as_they_are(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        strip_string(text)
    assert is_equiv(text, text)
    assert not is_equiv(text, text + " ")


def test_none_equals_only_itself() -> None:
    assert is_equiv(None, None)
    assert not is_equiv(None, "5") and not is_equiv("5", None)


@pytest.mark.parametrize(
    ("text", "box", "content"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("5", "5", "5"),
        (r"\boxed 5$ done", r"\boxed 5", "5"), (r"\boxed 5$ then \boxed{6}", r"\boxed 5", "5"),
        (r"\fbox{7}", r"\fbox{7}", r"\fbox{7}"),
    ],
)  # fmt: skip
def test_boxes(text: str, box: str, content: str) -> None:
    assert last_boxed_only_string(text) == box
    assert remove_boxed(box) == content


def test_box_that_never_closes() -> None:
    assert last_boxed_only_string(r"\boxed{5") is None
    with pytest.raises(TypeError):
        remove_boxed(None)


@given(_LATEX, _LATEX)
def test_comparison_never_raises_and_is_symmetric(first: str, second: str) -> None:
    assert is_equiv(first, second) == is_equiv(second, first)
    assert is_equiv(first, first)
