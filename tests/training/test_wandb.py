"""An offline Weights & Biases run holds the settings, the metrics under their names, and the completions."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rl4dlm

wandb = pytest.importorskip("wandb")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

# TRL's names as it gives them, and those of diffusion/. A name that is here must stay.
METRICS = {
    "train/clip_ratio/high_max",
    "train/clip_ratio/high_mean",
    "train/clip_ratio/low_mean",
    "train/clip_ratio/low_min",
    "train/clip_ratio/region_mean",
    "train/completions/clipped_ratio",
    "train/completions/max_length",
    "train/completions/max_terminated_length",
    "train/completions/mean_length",
    "train/completions/mean_terminated_length",
    "train/completions/min_length",
    "train/completions/min_terminated_length",
    "train/diffusion/early_eos_share",
    "train/diffusion/identical_completion_groups",
    "train/diffusion/nfe",
    "train/diffusion/rollout_gap",
    "train/diffusion/skipped_steps",
    "train/diffusion/rollout_tokens_per_second",
    "train/diffusion/tokens_per_forward",
    "train/entropy",
    "train/epoch",
    "train/frac_reward_zero_std",
    "train/global_step",
    "train/grad_norm",
    "train/kl",
    "train/learning_rate",
    "train/loss",
    "train/num_tokens",
    "train/reward",
    "train/reward_std",
    "train/rewards/reward/mean",
    "train/rewards/reward/std",
    "train/step_time",
}


def records(path: Path) -> Iterator[Any]:
    """The protocol buffers in a run file: 7 bytes, then blocks of 32 KiB with (crc, length, part) before each piece."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    ended()


def ended() -> None:
    """No run is left, and the process that writes the files is done."""
    wandb.finish()
    wandb.teardown()


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def contents(run: Path) -> tuple[set[str], dict[str, Any], Any]:
    """Names of what was logged, the configuration, and the last record of the run itself."""
    (file,) = run.glob("run-*.wandb")
    names: set[str] = set()
    settings: dict[str, Any] = {}
    itself = None
    for record in records(file):
        for item in record.history.item:
            names.add(item.key or ".".join(item.nested_key))
        for update in (record.config.update, record.run.config.update):
            settings.update({item.key: json.loads(item.value_json) for item in update if item.key})
        itself = record.run if record.run.run_id else itself
    return names, settings, itself


def test_an_offline_run_holds_settings_metrics_and_completions(make_trainer: Any, tmp_path: Path) -> None:
    given = {"log_replays": 2, "run_group": "seeds", "run_tags": ["tried"]}
    trainer = make_trainer(report_to="wandb", log_completions=True, max_steps=2, schedule_args={}, **given)
    trainer.train()
    ended()
    (run,) = runs(tmp_path)
    names, settings, itself = contents(run)
    assert {name for name in names if name.startswith("train/")} == METRICS
    assert settings["p_mask_prompt"] == 0.15 and settings["schedule"] == "low_confidence"
    assert settings["num_iterations"] == 2 and settings["max_completion_length"] == 8
    tables = sorted((run / "files" / "media" / "table").glob("completions_*.table.json"))
    assert len(tables) == 1  # two steps on one batch
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["step", "prompt", "completion", "reward", "nfe", "replay", "stop_reason", "advantage"]
    assert len(table["data"]) == 8

    assert settings["rl4dlm/trainer"] == "RecordingTrainer" and settings["rl4dlm/estimator"] == "MeanField"
    assert settings["rl4dlm/rewards"] == {"reward": 1.0}
    assert settings["rl4dlm/versions"]["rl4dlm"] == rl4dlm.__version__ and "cpu" in settings["rl4dlm/machine"]
    assert "rl4dlm/commit" in settings
    assert itself.run_group == "seeds" and list(itself.tags) == ["tried"]
    (page,) = (run / "files" / "media" / "html").glob("replay_*.html")
    (written,) = (Path(trainer.args.output_dir) / "replays").glob("step_*.html")
    assert page.read_text() == written.read_text()


def test_a_resumed_run_goes_on_as_the_one_it_was(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(report_to="wandb", max_steps=2, save_steps=2, save_strategy="steps").train()
    ended()
    time.sleep(1)  # a folder is named after the run and the second that it starts in
    make_trainer(report_to="wandb", max_steps=4, save_strategy="no").train(resume_from_checkpoint=True)
    ended()
    make_trainer(report_to="wandb", max_steps=1, save_strategy="no").train()
    ended()
    # Folders have the second and the id in their names, so that their order says nothing of runs of one second.
    found = [contents(run)[2].run_id for run in runs(tmp_path)]
    assert sorted(found.count(name) for name in set(found)) == [1, 2]


def test_a_run_of_the_users_own_is_used(make_trainer: Any, tmp_path: Path) -> None:
    wandb.init(project="mine", id="mine")
    make_trainer(report_to="wandb", max_steps=1).train()
    ended()
    (run,) = runs(tmp_path)
    _, settings, itself = contents(run)
    assert itself.run_id == "mine" and settings["rl4dlm/trainer"] == "RecordingTrainer"
