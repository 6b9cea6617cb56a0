"""Stopping and going on: the losses that remain are those of an unbroken run, bit for bit."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rl4dlm.training.checkpoints import Cycle, load_cycle, save_cycle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 7
# Four prompts of four generations and 8 rows a generation: an epoch is two generation cycles. What a checkpoint meets:
LAYOUTS = {
    # cycles of two optimizer steps: boundary at even steps, middle at odd ones
    "cycle of whole steps": {"per_device_train_batch_size": 8, "num_iterations": 2},
    # cycles of 6 micro-steps, 2 accumulated: a batch's first pass ends in the middle of an accumulation
    "pass ends inside accumulation": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "generation_batch_size": 12,
        "num_iterations": 2,
    },
    # cycles of 3 micro-steps, 2 accumulated: every other cycle starts in the middle of an accumulation
    "cycle starts inside accumulation": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "generation_batch_size": 12,
        "num_iterations": 1,
    },
}


class Kill(TrainerCallback):
    """Ends a run without warning, in the middle of accumulating gradients where there is one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", params=LAYOUTS)
def unbroken(
    request: pytest.FixtureRequest, build_trainer: Any, losses: Any, prompt_dataset: Any, tmp_path_factory: Any
) -> tuple[Path, dict[str, Any], list[float], dict[str, Any]]:
    """A run with a checkpoint after each step: its folder, its settings, its losses and its final weights."""
    folder = tmp_path_factory.mktemp("unbroken")
    options = {
        **LAYOUTS[request.param],
        "dataset": prompt_dataset(6 if "generation_batch_size" in LAYOUTS[request.param] else 4),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    trainer = build_trainer(folder, **options)
    trainer.train()
    assert trainer.state.epoch > 1, "the second epoch is part of the test"
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return folder, options, losses(trainer), weights


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resuming_from_any_checkpoint_repeats_the_remaining_losses(
    unbroken: Any, build_trainer: Any, losses: Any, tmp_path: Path, step: int
) -> None:
    folder, options, expected, weights = unbroken
    trainer = build_trainer(tmp_path, **{**options, "save_strategy": "no"})
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert losses(trainer) == expected  # the log of the first `step` steps comes from the checkpoint
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    unbroken: Any, build_trainer: Any, losses: Any, tmp_path: Path
) -> None:
    _, options, expected, weights = unbroken
    killed = build_trainer(tmp_path, callbacks=[Kill(3)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    trainer = build_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == expected
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_another_number_of_processes_starts_a_fresh_cycle_and_says_so(
    unbroken: Any, build_trainer: Any, losses: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, options, expected, _ = unbroken
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(folder / "checkpoint-1", checkpoint)
    cycle = load_cycle(str(checkpoint), 0, torch.device("cpu"))
    assert cycle is not None and cycle.batches is not None
    cycle.world_size = 2
    save_cycle(str(checkpoint), 0, cycle)
    trainer = build_trainer(tmp_path / "run", **{**options, "save_strategy": "no"})
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.checkpoints"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "a fresh generation replaces the batch that was in use" in caplog.text
    assert len(losses(trainer)) == STEPS and all(map(math.isfinite, losses(trainer)))
    assert losses(trainer)[:1] == expected[:1]


def test_training_again_starts_again(make_trainer: Any, losses: Any) -> None:
    trainer = make_trainer(max_steps=3, num_iterations=2, learning_rate=0.0, beta=0.0)
    trainer.train()
    first = [seen["row_ids"].tolist() for seen in trainer.seen]
    trainer.seen.clear()
    trainer.train()
    assert sorted(trainer.seen[0]["row_ids"].tolist()) == sorted(first[0]) == list(range(8))


def test_a_cycle_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any) -> None:
        raise OSError("disk full")

    cycle = Cycle(3, 1, {"num_iterations": 2}, [{"row_ids": torch.arange(4), "old_per_token_logps": None}])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        with pytest.raises(OSError, match="disk full"):
            save_cycle(str(tmp_path), 0, cycle)
    assert list(tmp_path.iterdir()) == []
    save_cycle(str(tmp_path), 1, cycle)
    assert load_cycle(str(tmp_path), 0, torch.device("cpu")) is None
    again = load_cycle(str(tmp_path), 1, torch.device("cpu"))
    assert again is not None and again.step == 3 and again.layout == {"num_iterations": 2}
    assert torch.equal(again.batches[0]["row_ids"], torch.arange(4))  # type: ignore[index]
