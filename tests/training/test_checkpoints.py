"""A checkpoint is complete or not there: R3 (kills, full disks), R4 (missing and damaged parts), R5, R8."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerState

from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.sft.trainer import DiffusionSFTConfig, DiffusionSFTTrainer
from rl4dlm.training import checkpoints
from rl4dlm.training.manifest import MANIFEST, CheckpointError, check_checkpoint, folder_to_resume
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
PARTS = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CYCLE = "generation_cycle_0.pt"


@pytest.fixture(scope="module")
def finished(build_trainer: Any, losses: Any, tmp_path_factory: Any) -> tuple[Path, list[float]]:
    """An unbroken run with a checkpoint after each step, and its losses."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = build_trainer(folder, **SAVING)
    trainer.train()
    return folder, losses(trainer)


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:
    """A copy of the run's last two checkpoints but one, to be damaged."""
    for step in (2, 3):
        shutil.copytree(finished[0] / f"checkpoint-{step}", tmp_path / f"run/checkpoint-{step}")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 64]) + content[middle + 64 :]
        )


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "garbled"])
@pytest.mark.parametrize("part", [*PARTS, CYCLE])
def test_r4_missing_and_damaged_parts_are_named_and_r3_skipped(
    run: Path, part: str, how: str, manifest: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if not manifest:  # as older versions have left it; what has no checksum of its own may then be garbled
        (run / "checkpoint-3" / MANIFEST).unlink()
        if how == "garbled" and part == "model.safetensors":
            return
    damage(run / "checkpoint-3" / part, how)
    with pytest.raises(CheckpointError, match=part):
        folder_to_resume(str(run / "checkpoint-3"), run, cycles=True)
    with caplog.at_level(logging.WARNING):
        assert folder_to_resume("latest", run, cycles=True) == str(run / "checkpoint-2")
    assert "checkpoint-3 is skipped" in caplog.text and part in caplog.text
    damage(run / "checkpoint-2" / part, "missing")
    assert folder_to_resume(True, run, cycles=True) is None
    assert "training starts anew" in caplog.text


@pytest.mark.parametrize("word", [True, "true", "True", "latest"])
def test_r3_words_for_the_newest_and_for_none(run: Path, word: Any) -> None:
    (run / "incomplete/checkpoint-9").mkdir(parents=True)
    (run / "checkpoint-10").mkdir()
    assert folder_to_resume(word, run) == str(run / "checkpoint-3")
    assert folder_to_resume("false", run) is folder_to_resume(None, run) is folder_to_resume(False, run) is None
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        folder_to_resume(run / "checkpoint-7", run)


def test_r4_a_trainer_refuses_a_checkpoint_without_optimizer(run: Path, build_trainer: Any) -> None:
    (run / "checkpoint-3/optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        build_trainer(run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-3"))


def test_r4_what_has_been_written_is_listed(run: Path) -> None:
    manifest = json.loads((run / "checkpoint-3" / MANIFEST).read_text())
    assert manifest["global_step"] == 3 and manifest["world_size"] == 1
    assert {*PARTS, CYCLE} <= set(manifest["files"])
    check_checkpoint(run / "checkpoint-3", cycles=True)


class Disk:
    """Writers that find the disk full at their n-th file of the checkpoint of a step."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.left, self.on = at, False
        self.hit = False
        for owner, name in (
            (torch, "save"),
            (TrainerState, "save_to_json"),
            (checkpoints, "write_manifest"),
            (tiny_llada().__class__, "save_pretrained"),
            (tiny_tokenizer().__class__, "save_pretrained"),
        ):
            patch.setattr(owner, name, self.full(getattr(owner, name)))

    def full(self, write: Any) -> Any:
        def writing(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.left -= 1
                if self.left < 0:
                    self.hit = True
                    raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return writing


@pytest.mark.parametrize("at", range(9))
def test_r3_a_disk_that_fills_while_saving_loses_nothing(
    finished: Any, build_trainer: Any, losses: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    trainer = build_trainer(tmp_path, **SAVING)
    with monkeypatch.context() as patch:
        disk, save = Disk(patch, at), trainer._save_checkpoint

        def saving(*args: Any) -> None:
            disk.on = trainer.state.global_step == 2
            save(*args)

        patch.setattr(trainer, "_save_checkpoint", saving)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert disk.hit and not (tmp_path / "checkpoint-2").exists()
    assert not any((tmp_path / "incomplete").glob("*"))
    again = build_trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint="latest")
    assert losses(again) == finished[1]
    assert again._initial_global_step == 1


def test_r3_rotation_keeps_the_newest_complete_and_the_best(run: Path, build_trainer: Any, prompt_dataset: Any) -> None:
    (run / "checkpoint-3/optimizer.pt").unlink()
    (run / "checkpoint-50").mkdir()  # of a run that was given up
    options = {**SAVING, "save_total_limit": 2, "per_device_eval_batch_size": 4, "metric_for_best_model": "reward"}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = build_trainer(run, eval_dataset=prompt_dataset(2), **options)
    trainer.train(resume_from_checkpoint=True)
    best = Path(trainer.state.best_model_checkpoint)
    left = sorted(path.name for path in run.glob("checkpoint-*"))
    assert best.parent == run and best.name in left and "checkpoint-4" in left and len(left) == 2
    saved = json.loads((run / "checkpoint-4/trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)


# --- R5 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"score_temperature": 0.5}, {"seed": 7}, {"temperature": 0.7}, {"denoising_steps": 8}, {"beta": 0.0}],
)
def test_r5_other_settings_start_a_fresh_batch_and_are_named(
    run: Path, build_trainer: Any, losses: Any, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    trainer = build_trainer(run, **{**SAVING, "save_strategy": "no", **change})
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert "a fresh generation replaces the batch" in caplog.text
    assert {"beta": "reference"}.get(next(iter(change)), next(iter(change))) in caplog.text


def test_r5_another_trainer_starts_a_fresh_batch(
    run: Path, build_trainer: Any, recording_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Another(recording_trainer):  # type: ignore[misc]
        pass

    with caplog.at_level(logging.WARNING):
        build_trainer(run, trainer=Another, **{**SAVING, "save_strategy": "no"}).train(str(run / "checkpoint-3"))
    assert "(trainer); a fresh generation" in caplog.text


def test_r6_steps_follow_from_the_optimizers(run: Path, finished: Any, build_trainer: Any, losses: Any) -> None:
    """A checkpoint that was written after a step's passes and before the optimizer's part of it goes on exactly."""
    folder = str(run / "checkpoint-3")
    cycle = checkpoints.load_cycle(folder, 0, torch.device("cpu"))
    assert cycle is not None and cycle.step == 3
    cycle.step = 2
    checkpoints.save_cycle(folder, 0, cycle)
    trainer = build_trainer(run, **{**SAVING, "save_strategy": "no"})
    trainer.train(folder)
    assert losses(trainer) == finished[1]


# --- R8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5])
def test_r8_a_stream_goes_on_where_it_was(
    build_trainer: Any, losses: Any, prompt_dataset: Any, tmp_path: Path, step: int
) -> None:
    """Six prompts are three batches: the stream starts again in step 7 of 8, two inner passes each."""
    options = {**SAVING, "max_steps": 8}
    unbroken = build_trainer(tmp_path, dataset=prompt_dataset(4).to_iterable_dataset(), **options)
    unbroken.train()
    assert unbroken.state.epoch > 1, "the second pass is part of the test"
    again = build_trainer(tmp_path / "again", dataset=prompt_dataset(4).to_iterable_dataset(), **options)
    again.train(str(tmp_path / f"checkpoint-{step}"))
    assert losses(again) == losses(unbroken)


@pytest.mark.parametrize("streamed", [True, False])
def test_r8_and_r3_hold_for_examples_too(losses: Any, tmp_path: Path, streamed: bool) -> None:
    texts = {"prompt": list("abcdef"), "completion": ["x" * (1 + i * i % 7) for i in range(6)]}

    def build(folder: Path) -> Any:
        data: Any = Dataset.from_dict(texts)
        options = {**SMALL_RUN, **SAVING, "max_steps": 8, "per_device_train_batch_size": 2}
        data = data.to_iterable_dataset() if streamed else data
        config = DiffusionSFTConfig(output_dir=str(folder), **options)
        return DiffusionSFTTrainer(tiny_llada(), config, data, None, tiny_tokenizer())

    unbroken = build(tmp_path)
    unbroken.train()
    assert unbroken.state.epoch > 2
    for step in (2, 3, 4, 7):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / f"checkpoint-{step}", tmp_path / f"again/checkpoint-{step}")
        (tmp_path / "again/checkpoint-8").mkdir()
        again = build(tmp_path / "again")
        again.train(resume_from_checkpoint=True)
        assert losses(again) == losses(unbroken), step


def test_r3_a_run_killed_behind_its_last_checkpoint_has_nothing_left_to_do(
    finished: Any, build_trainer: Any, losses: Any, tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "run/checkpoint-4")
    trainer = build_trainer(tmp_path / "run", **SAVING)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 4 and losses(trainer) == finished[1]
    saved = load_file(finished[0] / "checkpoint-4" / "model.safetensors")
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name].cpu(), value) for name, value in saved.items())


def test_r3_a_finished_run_goes_on_with_more_steps(finished: Any, build_trainer: Any, tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "run/checkpoint-4")
    trainer = build_trainer(tmp_path / "run", **{**SAVING, "max_steps": 6})
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 6
