"""P5, P6 and P7: what scripts can be told about data, how a misspelt setting is answered, and what --help shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from rl4dlm import DiffuGRPOTrainer, resources, tiny_llada
from rl4dlm.cli.arguments import (
    DataArguments,
    ExampleArguments,
    RewardArguments,
    TeachingArguments,
    load_splits,
    parse,
    with_completions,
)
from rl4dlm.cli.errors import is_bad_input
from rl4dlm.models.tiny import tiny_tokenizer
from rl4dlm.training.checks import checked_rewards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, count in (("train", 4), ("held_out", 2)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} {i}", "answer": str(i)}) + "\n" for i in range(count)))
        found[name] = str(path)
    return found


def test_p5_a_checkpoint_is_not_chosen_on_test_data() -> None:
    arguments = RewardArguments(task="countdown", task_args={"size": 2}, reward_funcs=["countdown"])
    assert arguments.dataset_test_split == "validation"
    _, held_out = load_splits(arguments, evaluating=True)
    from rl4dlm.tasks import load_task

    task = load_task("countdown", size=2)
    assert held_out is not None
    assert held_out["prompt"] == task.dataset("validation")["prompt"] != task.dataset("test")["prompt"]
    asked = DataArguments(task="countdown", task_args={"size": 2}, dataset_test_split="test")
    assert load_splits(asked, evaluating=True)[1]["prompt"] == task.dataset("test")["prompt"]  # type: ignore[index]
    assert DataArguments(dataset_name="x").dataset_test_split == "test"
    with pytest.raises(ValueError, match="'gsm8k' has no split 'validation' of its own; set validation_size"):
        load_splits(DataArguments(task="gsm8k"), evaluating=True)


def test_p5_a_file_has_its_evaluation_in_another_file_and_may_be_streamed(files: dict[str, str]) -> None:
    arguments = ExampleArguments(
        dataset_name=files["train"],
        dataset_test_file=files["held_out"],
        dataset_streaming=True,
        completion_column="answer",
    )
    train, held_out = load_splits(arguments, evaluating=True)
    assert isinstance(train, IterableDataset) and held_out is not None and len(held_out) == 2
    examples = with_completions(train, "answer")
    assert next(iter(examples)) == {"prompt": "train 0", "completion": "0"}
    assert load_splits(arguments, evaluating=False)[1] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "countdown", "dataset_streaming": True}, "dataset_streaming=True belongs to dataset_name"),
        ({"task": "countdown", "dataset_test_file": "x.jsonl"}, "dataset_test_file='x.jsonl' belongs to"),
        (
            {"dataset_name": "a.jsonl", "dataset_test_file": "x.jsonl", "dataset_test_split": "test"},
            "name either a file or a split",
        ),
    ],
)
def test_p5_settings_of_data_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_p5_a_reward_model_may_stand_alone(files: dict[str, str]) -> None:
    arguments = RewardArguments(dataset_name=files["train"], reward_model_name_or_path="models/judge")
    assert arguments.reward_funcs == []
    with pytest.raises(ValueError, match="reward_funcs is empty.*reward_model_name_or_path"):
        RewardArguments(dataset_name=files["train"])


def test_a_script_that_needs_no_rewards_keeps_the_columns_of_a_corpus(files: dict[str, str]) -> None:
    arguments = TeachingArguments(dataset_name=files["train"], completion_column="answer")
    train, _ = load_splits(arguments, evaluating=False)
    row = next(iter(with_completions(train, arguments.completion_column, keep=True)))
    assert row["completion"] == row["answer"] == "0" and row["prompt"] == "train 0"


def test_p6_names_of_rewards_are_looked_up_in_python(tmp_path: Path) -> None:
    (found,) = checked_rewards("countdown")  # type: ignore[misc]
    assert found.__name__ == "countdown"
    (tmp_path / "judge").mkdir()
    assert checked_rewards([str(tmp_path / "judge"), "owner/judge"]) == [str(tmp_path / "judge"), "owner/judge"]
    with pytest.raises(ValueError, match=r"unknown reward 'countdwn'.*did you mean 'countdown'.*OWNER/NAME"):
        DiffuGRPOTrainer(tiny_llada(), "countdwn", None, None, None, tiny_tokenizer())


def test_p6_misspelt_settings_are_answered_with_the_right_spelling(files: dict[str, str], tmp_path: Path) -> None:
    words = ["--dataset_name", files["train"], "--reward_funcs", "countdown"]
    (tmp_path / "config.yaml").write_text("reward_func: [countdown]\n")
    with pytest.raises(ValueError, match=r"--reward_func, in the configuration file.*did you mean '--reward_funcs'"):
        parse([*words, "--config", str(tmp_path / "config.yaml")], RewardArguments)
    with pytest.raises(ValueError, match=r"--dataset_nam, in the command line.*did you mean '--dataset_name'"):
        parse([*words, "--dataset_nam=x"], RewardArguments)


def script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(resources.find("trainers") / "spg.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_p6_bad_input_to_a_script_is_one_line_and_status_2(files: dict[str, str]) -> None:
    outcome = script("--dataset_name", files["train"], "--reward_funcs", "countdown", "--temperature", "-1")
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr
    (line,) = [line for line in outcome.stderr.splitlines() if "error:" in line]
    assert line.startswith("spg.py: error: temperature=-1.0")


def test_p6_what_fails_while_a_run_is_on_keeps_its_traceback() -> None:
    def _inner_training_loop() -> None:  # as transformers calls it
        raise ValueError("in a reward of the user's")

    with pytest.raises(ValueError) as failed:
        _inner_training_loop()
    assert not is_bad_input(failed.value)
    with pytest.raises(ValueError) as refused:
        DataArguments()
    assert is_bad_input(refused.value)


def test_p7_help_is_grouped_and_leaves_out_what_is_refused() -> None:
    outcome = script("--help")
    assert outcome.returncode == 0
    headings = re.findall(r"^(\w[^\n]*):$", outcome.stdout, flags=re.MULTILINE)
    assert headings == ["data and rewards", "rollout", "likelihood", "algorithm", "model", "TRL and transformers"]
    for refused in ("--use_vllm", "--vllm_", "--min_p", "--repetition_penalty", "--no_"):
        assert refused not in outcome.stdout
    rollout = outcome.stdout.split("rollout:")[1].split("likelihood:")[0]
    assert "--denoising_steps" in rollout and "--learning_rate" not in rollout
    assert "--num_views" in outcome.stdout.split("likelihood:")[1].split("algorithm:")[0]
