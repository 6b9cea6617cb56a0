"""R1: a step with something that is not finite is skipped on all processes, counted and named; NaN is never written."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer, tiny_llada, tiny_tokenizer
from rl4dlm.training.guard import NonFiniteError
from tests.launch import launch
from tests.training.conftest import prompts
from tests.training.steps import SMALL_RUN

WORKER = Path(__file__).parent / "guard_worker.py"
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))


def breaking(trainer: Any, steps: set[int], value: float = math.nan) -> None:
    """Makes the trainer's loss another value in some steps."""
    inner = trainer.loss

    def loss(scores: Any, batch: Any) -> torch.Tensor:
        found = inner(scores, batch)
        return found * value if trainer.state.global_step in steps else found

    trainer.loss = loss


def sft(folder: Path, steps: set[int], **changes: Any) -> tuple[Any, Weights]:
    weights = Weights()
    examples = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(8)], "completion": [str(i) for i in range(8)]})
    settings = {**SMALL_RUN, "max_steps": 6, "learning_rate": 1e-3, "optim": "adamw_torch", **changes}
    config = DiffusionSFTConfig(output_dir=str(folder), per_device_train_batch_size=2, **settings)
    trainer = DiffusionSFTTrainer(tiny_llada(), config, examples, None, tiny_tokenizer(), callbacks=[weights])
    inner = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        return found * math.nan if trainer.state.global_step in steps else found

    trainer.compute_loss = compute_loss
    return trainer, weights


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_r1_sft_skips_a_step_whose_loss_is_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, weights = sft(tmp_path, {2})
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.guard"):
        trainer.train()
    assert torch.equal(weights.seen[2], weights.seen[1]) and not torch.equal(weights.seen[3], weights.seen[2])
    assert all(seen.isfinite().all() for seen in weights.seen)
    losses = losses_of(trainer)
    assert [math.isfinite(value) for value in losses] == [True, True, False, True, True, True], (
        "the log tells the truth"
    )
    logged = [entry["diffusion/skipped_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 0, 1, 1, 1, 1]
    assert "optimizer step 3 was skipped" in caplog.text and "the loss" in caplog.text
    summary = trainer.state.log_history[-1]
    assert math.isfinite(summary["train_loss"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_r1_rl_skips_a_step_whose_loss_is_not_finite(make_trainer: Callable[..., Any], value: float) -> None:
    weights = Weights()
    trainer = make_trainer(max_steps=4, callbacks=[weights])
    breaking(trainer, {1}, value)
    trainer.train()
    assert torch.equal(weights.seen[1], weights.seen[0]) and not torch.equal(weights.seen[2], weights.seen[1])
    assert all(seen.isfinite().all() for seen in weights.seen)


def test_r1_a_gradient_that_is_not_finite_is_a_reason_by_itself(make_trainer: Callable[..., Any]) -> None:
    weights = Weights()
    trainer = make_trainer(max_steps=3, callbacks=[weights])
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: g * math.inf if trainer.state.global_step == 1 else g)
    trainer.train()
    assert torch.equal(weights.seen[1], weights.seen[0]) and weights.seen[2].isfinite().all()
    assert trainer._skipped_steps == 1


def test_r1_without_clipping_too(make_trainer: Callable[..., Any]) -> None:
    weights = Weights()
    trainer = make_trainer(max_steps=3, max_grad_norm=0.0, callbacks=[weights])
    breaking(trainer, {1})
    trainer.train()
    assert torch.equal(weights.seen[1], weights.seen[0]) and weights.seen[2].isfinite().all()


def test_r1_one_bad_micro_batch_drops_the_whole_step(make_trainer: Callable[..., Any]) -> None:
    weights = Weights()
    trainer = make_trainer(
        max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, callbacks=[weights]
    )
    inner, calls = trainer.loss, []

    def loss(scores: Any, batch: Any) -> torch.Tensor:
        calls.append(trainer.state.global_step)
        found = inner(scores, batch)
        return found * math.nan if calls.count(1) == 1 and calls[-1] == 1 else found

    trainer.loss = loss
    trainer.train()
    assert torch.equal(weights.seen[1], weights.seen[0]) and not torch.equal(weights.seen[2], weights.seen[1])


def test_r1_names_the_first_thing_and_its_rows(
    make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_steps=2)
    inner = trainer.prepare_batch

    def prepare_batch(batch: dict[str, Any], rewards: torch.Tensor) -> None:
        inner(batch, rewards)
        batch["old_per_token_logps"][3] = -math.inf

    trainer.prepare_batch = prepare_batch
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.guard"):
        trainer.train()
    assert "the score of the old policy of rows 3 is not finite on process 0" in caplog.text


def test_r1_a_run_of_bad_steps_ends_before_a_checkpoint(tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path, {2, 3, 4, 5}, max_skipped_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteError, match="max_skipped_steps=3"):
        trainer.train()
    assert trainer.state.global_step == 4
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{i}" for i in range(1, 5)]


def test_r1_a_model_that_is_not_finite_is_not_written(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="nothing was written to .*saved"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_r1_max_skipped_steps_is_checked(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps"):
        DiffusionSFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, max_skipped_steps=value)


def test_r1_the_filter_of_the_log_is_off(make_trainer: Callable[..., Any]) -> None:
    assert make_trainer().args.logging_nan_inf_filter is False


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [None, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_r1_nan_on_one_of_two_processes_skips_the_step_on_both(tmp_path: Path, stage: int | None) -> None:
    arguments: list[Any] = [tmp_path / "results.pt"]
    if stage is not None:
        if not importlib.util.find_spec("deepspeed"):
            pytest.skip("deepspeed is not installed")
        arguments.append(tmp_path / "deepspeed.json")
        gather = {"stage3_gather_16bit_weights_on_model_save": stage == 3}
        arguments[-1].write_text(json.dumps({**ZERO, "zero_optimization": {"stage": stage, **gather}}))
    launch(WORKER, tmp_path, *arguments)
    first, second = torch.load(tmp_path / "results.pt", weights_only=False)
    assert first["world_size"] == 2
    for found in (first, second):
        weights = found["weights"]
        assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
        assert all(seen.isfinite().all() for seen in weights)
        assert torch.equal(weights[-1], first["weights"][-1])
    assert [entry["diffusion/skipped_steps"] for entry in first["log"]] == [0, 1, 1, 1]


def test_r1_an_evaluation_that_is_not_finite_leaves_training_alone(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(max_steps=3, eval_dataset=prompts(4), eval_strategy="steps", eval_steps=1)
    inner = trainer.loss

    def loss(scores: Any, batch: Any) -> torch.Tensor:
        found = inner(scores, batch)
        return found if trainer.model.training else found * math.nan

    trainer.loss = loss
    trainer.train()
    assert trainer._skipped_steps == 0
    trainer.evaluate()
    assert not trainer._noted, "nothing is remembered"


def test_r1_examples_of_supervised_training_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = sft(tmp_path, set(), max_steps=2)
    inner = trainer.draw

    def draw(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            head = trainer.model.get_output_embeddings().weight
            head[:] = math.nan if trainer.state.global_step == 1 else head
        return inner(inputs, *args, **kwargs)

    trainer.draw = draw
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.guard"), pytest.raises(NonFiniteError):
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    assert re.search(r"the score of rows \d+.* is not finite on process 0", caplog.text)
    assert not (tmp_path / "final").exists()
