"""R7, R9, R10: runs that would train nothing, logs on full disks, and what a model may do to a terminal."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rl4dlm import DiffuGRPOConfig, DiffusionSFTConfig
from rl4dlm.tracking import training
from rl4dlm.tracking.printable import printable_entries


def few(count: int) -> Dataset:
    return Dataset.from_dict({"prompt": [str(i) for i in range(count)]})


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (1, {"per_device_train_batch_size": 8, "num_generations": 4}),
        (3, {"per_device_train_batch_size": 8, "num_generations": 2}),
        (3, {"per_device_train_batch_size": 4, "num_generations": 2, "gradient_accumulation_steps": 2}),
        (3, {"per_device_train_batch_size": 4, "num_generations": 2, "steps_per_generation": 2}),
    ],
)
def test_r7_a_dataset_below_one_generation_batch_is_refused(
    make_trainer: Callable[..., Any], count: int, changes: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=rf"train_dataset has {count} prompts, and one generation batch takes"):
        make_trainer(dataset=few(count), **changes)


def test_r7_an_empty_dataset_has_its_own_message(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(dataset=few(1).select([]))


def test_r7_what_an_epoch_leaves_out_is_said_once(
    make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.checks"):
        trainer = make_trainer(dataset=few(3), max_steps=2)
        trainer.train()
    assert caplog.text.count("each epoch leaves out 1 of 3 prompts") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.checks"):
        make_trainer(dataset=few(4))
    assert "leaves out" not in caplog.text


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_r9_a_full_disk_does_not_end_training(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "write_page", full)
    monkeypatch.setattr("pandas.DataFrame.to_parquet", full)
    trainer = make_trainer(max_steps=4, log_completions=True, log_replays=2)
    with caplog.at_level(logging.WARNING, logger="rl4dlm.tracking.training"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("No space left on device") == 1, "said once"


def test_r9_the_newest_pages_and_tables_are_kept(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    make_trainer(max_steps=5, num_iterations=1, log_completions=True, log_replays=1, log_total_limit=2).train()
    for folder in ("replays", "completions"):
        names = sorted(path.stem.rpartition("_")[2] for path in (tmp_path / "run" / folder).iterdir())
        assert names == ["00004", "00005"], folder


@pytest.mark.parametrize("value", [0, -3])
def test_r9_the_limit_is_checked(make_trainer: Callable[..., Any], value: int) -> None:
    with pytest.raises(ValueError, match="log_total_limit"):
        make_trainer(log_total_limit=value)


HOSTILE = ["\x1b[2J", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x9b31m", "\r", "\x08", "\u202eabc", "\u2066x", "\x00"]


@pytest.mark.parametrize("text", HOSTILE)
def test_r10_what_moves_a_terminal_is_escaped(text: str) -> None:
    shown = printable_entries({"completion": [[{"role": "assistant", "content": f"a{text}b\nc"}]]})
    content = shown["completion"][0][0]["content"]
    assert content.startswith("a\\") and content.endswith("b\nc")
    assert all(c.isprintable() or c == "\n" for c in content)


def test_r10_the_table_of_completions_is_escaped(
    make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=1, log_completions=True)
    monkeypatch.setattr(trainer._tokenizer, "batch_decode", lambda ids, *a, **k: ["x\x1b]52;c;aGk=\x07y" for _ in ids])
    trainer.train()
    printed = capsys.readouterr().out
    assert "\x1b]52" not in printed and "\x07" not in printed and "\\x1b]52" in printed


def test_a12_several_evaluation_sets_have_names_of_their_own(make_trainer: Callable[..., Any]) -> None:
    sets = {"easy": few(4), "hard": Dataset.from_dict({"prompt": ["zzzz"] * 4})}
    trainer = make_trainer(
        max_steps=2,
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_hard_reward",
        greater_is_better=True,
    )
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_easy_reward", "eval_hard_reward", "eval_hard_loss"} <= logged
    assert "eval_reward" not in logged
    assert trainer.state.best_metric is not None
    assert trainer.evaluate(few(4))["eval_reward"] is not None, "one set alone keeps its name"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),  # TRL's default
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": True}, True),
    ],
)
@pytest.mark.parametrize("config", [DiffuGRPOConfig, DiffusionSFTConfig])
def test_p7_checkpointing_by_either_name_without_a_warning(config: Any, given: Any, expected: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = config(output_dir="unused", use_cpu=True, **given)
    assert made.activation_checkpointing is expected and made.gradient_checkpointing is expected
