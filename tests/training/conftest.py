"""Small trainers: a two-layer denoiser, a canvas of eight characters, and a reward that tells completions apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.training.steps import SMALL_RUN


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Some number that depends on every character."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def prompts(count: int = 12) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_dict({"prompt": [("abcdefgh"[: 1 + i % 5] + str(i)) for i in range(count)]})


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Quick and quiet: 8 rows of 4 generations, whole steps, plain SGD so that differences are not amplified."""
    return {
        "output_dir": str(folder),
        "max_completion_length": 8,
        "denoising_steps": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        **SMALL_RUN,
        **changes,
    }


class RecordingTrainer(DiffuGRPOTrainer):
    """diffu-GRPO that keeps what its loss was computed from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def loss(self, scores: Any, batch: dict[str, Any]) -> torch.Tensor:
        value = super().loss(scores, batch)
        copies = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        self.seen.append({**copies, "scores": scores.log_probs.detach().clone(), "loss": value.detach().clone()})
        return value


class RecordingEstimator(Estimator):
    """Hands on what another estimator draws, and keeps it: (row id, iteration, hidden prompt positions)."""

    def __init__(self, estimator: Estimator) -> None:
        self.inner, self.scope, self.fresh = estimator, estimator.scope, estimator.fresh
        self.drawn: list[tuple[bool, int, int, tuple[int, ...]]] = []

    def draw(self, rows: Any, *, seed: int, iteration: int) -> Any:
        """Keeps whether gradients were recorded, that is whether the loss asked."""
        views = self.inner.draw(rows, seed=seed, iteration=iteration)
        for i, row in enumerate(rows.row_ids.tolist()):
            positions = rows.prompt_mask[i].long().cumsum(-1) - 1
            hidden = views.hidden[i, 0, : len(positions)]
            self.drawn.append((torch.is_grad_enabled(), row, iteration, tuple(positions[hidden].tolist())))
        return views


@pytest.fixture(scope="session")
def build_trainer() -> Callable[..., Any]:
    """Builds a trainer in a folder; what is not given is small. Settings are keywords."""

    def build(
        folder: Path,
        model: Any = None,
        *,
        rewards: Any = reward,
        dataset: Any = None,
        eval_dataset: Any = None,
        trainer: type = RecordingTrainer,
        config: type = DiffuGRPOConfig,
        tokenizer: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        credit: Any = None,
        **changes: Any,
    ) -> Any:
        return trainer(
            tiny_llada() if model is None else model,
            rewards,
            config(**settings(folder, **changes)),
            prompts() if dataset is None else dataset,
            eval_dataset,
            tiny_tokenizer() if tokenizer is None else tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
            **({} if credit is None else {"credit": credit}),
        )

    return build


@pytest.fixture
def make_trainer(build_trainer: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`build_trainer` in a folder of the test's own."""
    return functools.partial(build_trainer, tmp_path / "run")


@pytest.fixture
def recording_estimator() -> type[RecordingEstimator]:
    return RecordingEstimator


@pytest.fixture(scope="session")
def recording_trainer() -> type[RecordingTrainer]:
    return RecordingTrainer


@pytest.fixture(scope="session")
def prompt_dataset() -> Callable[..., Dataset]:
    return prompts


@pytest.fixture(scope="session")
def losses() -> Callable[[Any], list[float]]:
    """The logged losses of a finished run."""

    def of(trainer: Any) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return of
