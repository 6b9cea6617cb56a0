"""A variable is an object of the program's only where the test shows that it is."""

from __future__ import annotations

import ast

import pytest

from rl4dlm.grading.code.objects import shown_by_use
from rl4dlm.grading.code.rewrite import rewritten


@pytest.mark.parametrize(
    ("test", "objects"),
    [
        ("c = cache()\nc.put(1, 2)\nassert c.get(1) == 2", {"c"}),
        ("c = make()\nassert c.count() == 3", {"c"}),
        ("c = make()\nassert c.keys(2) == 3", {"c"}),
        ("c = make()\nassert c.size == 3", {"c"}),
        ("d = f(1)\nassert d.get(1) == 2", set()),  # a dictionary
        ("xs = f(1)\nxs.append(2)\nassert xs.count(2) == 1", set()),  # a list
        ("c = make()\nc.put(1)\nassert c == [1]", set()),  # which data alone can be compared with
        ("c = make()\nc.put(1)\nassert len(c) == 1", set()),
        ("s = f(1)\nassert s.strip().split() == ['a']", set()),
        ("z = f(1)\nassert z.real == 1", set()),
    ],
)
def test_what_shows_an_object(test: str, objects: set[str]) -> None:
    assert shown_by_use(ast.parse(test)) == objects


def test_methods_of_data_are_called_outside() -> None:
    """What a program returns in a list's place could have a `count` that is always right."""
    turned = rewritten("xs = f(1)\nassert xs.count(2) == 1")
    assert turned is not None and ".count" not in str(turned.expression)
    turned = rewritten("c = make()\nassert c.count() == 1")
    assert turned is not None and "c.count()" in str(turned.expression)
