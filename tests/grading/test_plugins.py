"""Reward functions are found by each kind of name, and a name that finds none is told what exists."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rl4dlm.grading import available_rewards, load_reward, load_rewards, plugins

_PLUGIN = """
from pathlib import Path

with Path(__file__).with_suffix(".log").open("a") as log:
    log.write("loaded ")

def custom(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def other(completions, **columns):
    return [None for _ in completions]

def helper(text):
    return text
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "custom.py"
    path.write_text(_PLUGIN)
    return path


def test_every_listed_reward_loads_and_keeps_its_name() -> None:
    names = available_rewards()
    assert {"countdown", "few_clue_sudoku", "gsm8k", "gsm8k:correctness", "math", "sudoku"} <= set(names)
    assert [function.__name__ for function in load_rewards(names)] == [name.split(":")[-1] for name in names]


def test_plugin_called_math_does_not_stand_for_the_standard_library() -> None:
    load_reward("math")
    assert math.sqrt(4) == 2


def test_file_with_and_without_function(plugin: Path) -> None:
    assert load_reward(str(plugin))([], ["abc"]) == [3.0]
    assert load_reward(f"{plugin}:other")(completions=["abc"]) == [None]
    assert plugin.with_suffix(".log").read_text().split() == ["loaded"]


def test_module_and_function() -> None:
    assert load_reward("rl4dlm.grading.text:completion_texts")(["a"]) == ["a"]


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "rl4dlm.grading.text:completion_texts", plugins.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == plugins.ENTRY_POINT_GROUP else [])
    assert load_reward("mine")(["a"]) == ["a"]
    assert "mine" in available_rewards()


@pytest.mark.parametrize("name", ["nope", "nope:f", "no.such.module:f", ":", "", "gsm8k.correctness"])
def test_unknown_name_lists_what_exists(name: str) -> None:
    with pytest.raises(ValueError, match="known rewards: .*countdown.*gsm8k:correctness"):
        load_reward(name)


def test_unknown_function_lists_those_of_the_file(plugin: Path) -> None:
    with pytest.raises(ValueError, match="correctness_compat"):
        load_reward("gsm8k:nope")
    with pytest.raises(ValueError, match="'nope'; it defines custom, other, helper"):
        load_reward(f"{plugin}:nope")


def test_what_is_no_reward_function_is_refused(plugin: Path) -> None:
    with pytest.raises(ValueError, match="no argument `completions`"):
        load_reward(f"{plugin}:helper")
    with pytest.raises(ValueError, match="not a function"):
        load_reward("rl4dlm.grading.plugins:ENTRY_POINT_GROUP")


def test_missing_file_and_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        load_reward(str(tmp_path / "none.py"))
    with pytest.raises(TypeError, match="int"):
        load_reward(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="countdown"):
        load_rewards("countdown")


def test_file_that_fails_to_load_may_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('first')")
    with pytest.raises(RuntimeError, match="first"):
        load_reward(str(path))
    path.write_text("def broken(completions, **columns):\n    return [1.0]\n")
    assert load_reward(str(path))(completions=["x"]) == [1.0]
