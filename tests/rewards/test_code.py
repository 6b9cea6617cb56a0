"""The rewards for code: what each pays, in its own form and in that of the published numbers."""

from __future__ import annotations

from typing import Any

import pytest

from rl4dlm.grading import load_reward, pool
from rl4dlm.grading.code import verdicts
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.sandbox.programs import Program, Result
from rl4dlm.tasks import load_task
from rl4dlm.training.checks import checked_rewards

SUM = "def sum_list(numbers):\n    return sum(numbers)"
PROBLEM = Problem(
    tuple({"source": f"assert sum_list({xs}) == {sum(xs)}"} for xs in ([1, 2, 3], [], [-1, 1], [5])),
    entry_point="sum_list",
).to_json()

# The cases of DiffuCoder's own tests (apple/ml-diffucoder, tests/test_code_reward.py): rewards for program and form.
RECORDED = {
    f"Let me implement a function.\n```python\n{SUM}\n```\n": (1.0, 1.0),
    "Below is the implementation.\n```python\ndef sum_list(numbers)\n    return sum(numbers)\n```\n": (0.0, 0.5),
    f"Let me implement a function.\n```python\n{SUM}\n\n": (0.0, 0.0),
    f"```python\n# First attempt\ndef sum_list(numbers):\n    return 0\n```\n```python\n{SUM}\n```\n": (0.0, 0.0),
}


def pay(name: str, *texts: str, problem: str | None = PROBLEM, **columns: Any) -> list[float | None]:
    return load_reward(name)(["?"] * len(texts), list(texts), problem=[problem] * len(texts), **columns)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> list[list[Program]]:
    """Takes the place of the sandbox; what was asked of it. What a part says decides what comes of it."""
    asked: list[list[Program]] = []

    def run(programs: list[Program]) -> list[list[Result]]:
        asked.append(programs)
        words = ("timeout", "lost", "budget", "error", "ended")
        return [
            [Result(next((word for word in words if word in program.source), "value"), [15]) for _ in program.parts]
            for program in programs
        ]

    monkeypatch.setattr(verdicts, "run_programs", run)
    return asked


def test_diffucoders_recorded_rewards() -> None:
    recorded = list(RECORDED.values())
    assert pay("code:code_compat", *RECORDED) == [program for program, _ in recorded]
    assert pay("code:format_compat", *RECORDED) == [form for _, form in recorded]
    # What the paper describes: a block that ends the completion is as good, and of two blocks the last one counts.
    assert pay("code", *RECORDED) == [1.0, 0.0, 0.0, 1.0]
    assert pay("code:format", *RECORDED) == [form for _, form in recorded]


def test_the_share_of_tests_and_all_of_them() -> None:
    texts = [f"```python\n{SUM}\n```", "```python\ndef sum_list(n):\n    return 0\n```", "no program", ""]
    assert pay("code", *texts) == [1.0, 0.5, 0.0, 0.0]
    assert pay("code:all_passed", *texts) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "fixed", "compat"),
    [
        ("```python\nx = 1\n```", 1.0, 0.0),  # nothing behind the block, and the original asks for a line break
        ("```python\nx = 1\n```\n", 1.0, 1.0),
        ("```python\nx = 1\n```\n\n", 1.0, 0.0),
        ("```py\nx = 1\n```\n", 1.0, 0.0),
        ("text\n```python\nx = \n```\n", 0.5, 0.5),
        ("```python\nx = 1\n```\nDone.", 0.0, 0.0),
        ("```\nx = 1\n```\n", 0.0, 0.0),
        ("```python x = 1```\n", 0.0, 0.0),
        ("x = 1", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("```python\n  x = 1\n```\n", 0.5, 1.0),  # the original strips the program
    ],
)
def test_form(text: str, fixed: float, compat: float) -> None:
    assert pay("code:format", text) == [fixed]
    assert pay("code:format_compat", text) == [compat]


def test_answer_tags() -> None:
    block = "```python\nx = 1\n```"
    texts = [f"<answer>\n{block}\n</answer>", block, "<answer>x = 1</answer>", f"<answer>\n{block}", ""]
    assert pay("code:answer_tags", *texts) == [0.5, 0.0, 0.0, 0.0, 0.0]


def test_d1s_reward_for_kodcode() -> None:
    named = SUM.replace("sum_list", "total")
    texts = {
        f"<answer>\n```python\n{SUM}\n```\n</answer>": 1.5,
        f"```python\n{SUM}\n```": 1.0,
        f"```python\n{named}\n```": 1.0,  # the function gets the name that is asked for
        f"<answer>\n```python\nimport os\n{SUM}\n```\n</answer>": 0.5,
        f"```python\nx = 3; osmosis = 1\n{SUM}\n```": 0.0,  # " os" begins another word
        "```python\nx = 1\n```": 0.0,
        f"```python\ndef sum_list(x):\n    return 0\n```\n```python\n{SUM}\n```": 0.5,  # the first block counts
        "": 0.0,
    }
    assert dict(zip(texts, pay("code:kodcode_compat", *texts), strict=True)) == texts
    unnamed = Problem(({"source": "assert sum_list([1]) == 1"},)).to_json()
    assert pay("code:kodcode_compat", f"```python\n{SUM}\n```", problem=unnamed) == [None]


def test_a_row_without_a_problem_cannot_be_scored_and_a_column_without_any_is_refused() -> None:
    text = f"```python\n{SUM}\n```"
    reward = load_reward("code")
    assert reward(["?"] * 3, [text] * 3, problem=[PROBLEM, None, "{}"]) == [1.0, None, None]
    with pytest.raises(ValueError, match="column 'problem'.*'assert x'"):
        reward(["?"], [text], problem=["assert x"])
    with pytest.raises(ValueError, match="needs the dataset column 'problem'"):
        reward(["?"], [text])


def test_tests_that_are_none_do_not_count(sandbox: list[list[Program]]) -> None:
    broken = Problem(({"source": "x = 1"}, {"other": "?"}, {"source": "assert f(1) == 15"})).to_json()
    only_broken = Problem(({"source": "not python"},)).to_json()
    assert pay("code", "f = 1", problem=broken) == [1.0]
    assert pay("code", "f = 1", problem=only_broken) == [None]


def test_what_the_machine_has_lost_is_not_scored_and_what_hangs_is(sandbox: list[list[Program]]) -> None:
    problem = Problem(({"source": "assert f(1) == 15"},)).to_json()
    assert pay("code", "x = 'lost'", "x = 'budget'", "x = 'timeout'", "x = 'error'", problem=problem) == [
        None,
        None,
        0.0,
        0.0,
    ]
    assert pay("code:all_passed", "x = 'lost'", "x = 'ended'", problem=problem) == [None, 0.0]
    late = "x = 1\n# timeout\n"
    assert pay("code:code_compat", f"```python\n{late}```\n", problem=problem) == [0.0]


def test_programs_of_a_batch_run_together_and_equal_ones_once(sandbox: list[list[Program]]) -> None:
    problem = Problem(({"source": "assert f(1) == 15"},)).to_json()
    assert pay("code", "f = 1", "f = 1", "f = 2", "f = (", "", problem=problem) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert [[program.source for program in batch] for batch in sandbox] == [["f = 1", "f = 2"]]
    pay("code", "f = (", "", problem=problem)
    assert len(sandbox) == 1  # a batch without programs asks for nothing


def test_metrics(sandbox: list[list[Program]]) -> None:
    problem = Problem(
        ({"source": "assert f(1) == 15"}, {"source": "assert all(x for x in f(1))"}), entry_point="f"
    ).to_json()
    logged: dict[str, float] = {}
    texts = ["x = 1", "x = 'timeout'", "x = 'lost'", "x = ("]
    pay("code", *texts, problem=problem, log_metric=logged.__setitem__)
    assert logged.pop("reward/seconds") >= 0
    assert logged == {
        "reward/deadline_rate": 0.25,
        "reward/lost_rate": 0.25,
        "reward/no_program_rate": 0.25,
        "reward/tests_apart_share": 0.5,
        "reward/tests_inside_share": 0.0,
    }


def test_a_machine_without_a_sandbox_is_refused_when_the_trainer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_configured", {"sandbox_backend": "fusion", "sandbox_url": "nowhere"})
    for name in ("code", "code:all_passed", "code:code_compat", "code:kodcode_compat"):
        with pytest.raises(ValueError, match="sandbox_url='nowhere'"):
            checked_rewards([name])
    assert checked_rewards(["code:format"])
    with pytest.raises(ValueError, match="sandbox_url='nowhere'"):
        load_task("code_mini").require()
    load_task("countdown").require()


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="sandbox_inside='yes'; it must be one of unscored, paid"):
        pool.configure(sandbox_inside="yes")
    with pytest.raises(ValueError, match="sandbox_backend='docker'; it must be one of local, fusion, e2b"):
        pool.configure(sandbox_backend="docker")
    monkeypatch.setenv("RL4DLM_REWARD_SANDBOX_BACKEND", "none")
    with pytest.raises(ValueError, match="RL4DLM_REWARD_SANDBOX_BACKEND='none'"):
        pool.current_settings()
