"""Equality of mathematical answers, computed in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rl4dlm.grading import latex, load_reward
from rl4dlm.grading.latex import equivalent
from rl4dlm.grading.sandbox import levels
from rl4dlm.grading.workers import Outcome

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the worker pool is for POSIX systems")


def test_mathematics_not_spelling_decides() -> None:
    pairs = [
        (r"\frac{1}{2}", "0.5"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("1000", "1,000"),
        (r"-\frac12", "-1/2"),
    ]
    assert equivalent(pairs, deadline=60) == [True] * len(pairs)
    assert equivalent([("5", "6"), ("x", "y"), ("5", ""), ("5", "5 " * 1000)], deadline=60) == [False] * 4


def test_answer_that_never_ends_is_wrong_and_harms_no_other() -> None:
    assert equivalent([("3", "9^{9^{9^9}}"), ("4", r"\sqrt{16}")], deadline=3.0) == [False, True]


def test_off_the_main_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.extend(equivalent([(r"\frac{2}{4}", "0.5")], deadline=60)))
    thread.start()
    thread.join()
    assert results == [True]


def test_latex_is_never_parsed_in_this_process() -> None:
    program = (
        "import sys\n"
        "from rl4dlm.grading.latex import equivalent\n"
        "assert equivalent([('2', '1+1')], deadline=60) == [True]\n"
        "print(sorted({'sympy', 'math_verify', 'torch'} & set(sys.modules)))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_a_machine_without_a_sandbox_compares_with_limits_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(levels, "why_not", lambda level: "not permitted")
    levels.announce_own.cache_clear()
    latex._pool.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="rl4dlm"):
            assert equivalent([("2", "1+1"), ("2", "3")], deadline=60) == [True, False]
            assert "namespaces: not permitted" in caplog.text
        assert list(latex._pool()._sandboxes) == ["limits"]
    finally:
        latex._pool().close()
        latex._pool.cache_clear()


def test_what_was_not_compared_is_neither_equal_nor_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"1+1": Outcome(True), "3": Outcome(False), "late": Outcome(None, "deadline")}

    class Pool:
        def map(self, items: list[list[str]], deadline: float) -> list[Outcome]:
            return [known.get(answer, Outcome(None, "budget", lost=True)) for _, answer in items]

    monkeypatch.setattr(latex, "_pool", Pool)
    answers = ["1+1", "3", "late", "0+2", "1+1=0+2", "0+2=3"]
    assert equivalent([("2", answer) for answer in answers]) == [True, False, False, None, None, False]
    rows = {"prompts": ["?"] * 6, "answer": ["2"] * 6, "completions": [rf"\boxed{{{answer}}}" for answer in answers]}
    assert load_reward("math:correctness")(**rows) == [2.0, 0.0, 0.0, None, None, 0.0]


WRONG = [  # A1, A2: what pays for something else than the answer can be exploited
    ("7", r"7 \text{ or } 8"), ("7", "12=7"), ("7", "3+5=7"), ("7", "x=6=7"), ("2", "1=2"), ("7", r"7\text{ 8}"),
    ("0.0000003", "0.0000001"), ("3\\times 10^{-8}", "10^{-8}"), ("0", "10^{-9}"), ("(0,1)", r"\{0,1\}"),
    ("[0,1]", "(0,1)"), ("1,2,3", r"1,2,\dots,3"), ("abc", "cab"), (r"\text{east}", r"\text{seat}"), ("7", "7, 8"),
]  # fmt: skip
RIGHT = [  # A1, A3: what must stay, or become, right
    ("5.4", r"5.4\text{ cents}"), ("7", "x=7"), ("7", "x = 7"), ("8", "3+5=8"), ("70", "70°"),
    ("9", r"\text{9 minutes}"), (r"\frac{1}{2}", "0.5"), ("y=2x+3", "y=3+2x"), (r"\{0,1\}", r"\{1,0\}"),
    (r"\sqrt{2}", r"x_1=\sqrt2"), ("12", r"12\text{ cm}^2"),
]  # fmt: skip


def test_a1_a2_what_is_wrong_pays_nothing():
    assert not any(equivalent(WRONG)), [pair for pair, equal in zip(WRONG, equivalent(WRONG), strict=True) if equal]


def test_a1_a3_what_is_right_pays():
    assert all(equivalent(RIGHT)), [pair for pair, equal in zip(RIGHT, equivalent(RIGHT), strict=True) if not equal]
