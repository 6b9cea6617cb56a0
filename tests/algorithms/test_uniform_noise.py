"""Trainers on DiffusionGemma's noise: random tokens in place of a mask token; who trains, and who says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import rl4dlm
from rl4dlm.likelihood.uniform import UniformNoise
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_tokenizer
from tests.algorithms.test_igpo import HINTS
from tests.training.steps import SMALL_RUN, recording

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

TRAINERS: dict[str, dict[str, Any]] = {
    "DiffuGRPOTrainer": {},
    "WD1Trainer": {},
    "ESPOTrainer": {"form": "count", "num_views": 2, "beta": 0.1},
    "DiffusionGDPOTrainer": {"nodes": 2, "beta": 0.1},
    "BGPOTrainer": {"num_views": 2, "complement": True, "beta": 0.1},
    "DMPOTrainer": {"temperature": 0.8, "alpha": 0.5, "num_views": 2, "form": "count"},
    "SPGTrainer": {"masking": "random", "negatives": "elbo"},
    "StableDRLTrainer": {"masking": "random", "negatives": "elbo"},
    "LightningRLTrainer": {"min_speed_range": 0.0, "speed_reward": "letters", "accuracy_from": 0.5},
    "GDSDTrainer": {"num_views": 2, "weights": "elbo", "form": "count", "beta": 0.1},
    "CoupledGRPOTrainer": {},
    "UniGRPOTrainer": {},
    "EBPOTrainer": {"num_views": 2, "beta": 0.1},
    "DreamCoderRLTrainer": {"cart_p": None, "substitute_groups": False, "beta": 0.1},
}
PROMPTS = ["abc1", "de2", "fghi34", "j"]


def eighths(completions: list[str], **columns: Any) -> list[float]:
    return [sum(map(ord, text)) % 8 / 8 for text in completions]


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.islower() for c in text) / 8 for text in completions]


def build(name: str, folder: Path, **changes: Any) -> Any:
    trainer = getattr(rl4dlm, name)
    settings = {
        **SMALL_RUN,
        "output_dir": str(folder),
        "max_completion_length": 8,
        "schedule": "entropy_bound_canvas",
        "schedule_args": {"max_steps": 2, "entropy_bound": 4.0},
        "top_p": 1.0,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        "max_grad_norm": 0.0,
        "max_steps": 2,
        **changes,
    }
    return recording(trainer)(
        tiny_diffusion_gemma(initializer_range=0.1, dtype=torch.float64),
        [eighths, letters] if name == "LightningRLTrainer" else eighths,
        trainer.config_class(**settings),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
    )


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


QUICK = ("ESPOTrainer", "BGPOTrainer", "DMPOTrainer", "SPGTrainer", "UniGRPOTrainer")
"""One for each kind of loss; the others say the same and take their time."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRAINERS]
)
def test_it_trains_and_splitting_a_batch_changes_nothing(name: str, tmp_path: Path) -> None:
    """Two steps in float64: the same tokens and masks for all policies, whatever the micro-batch."""
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = build(name, tmp_path / str(size), **TRAINERS[name], **split)
        before = weights(trainer)
        assert isinstance(trainer.estimator, UniformNoise)
        trainer.train()
        after = weights(trainer)
        assert max(float((after[n] - before[n]).abs().max()) for n in before) > 1e-5
        assert not any("rollout_gap" in key for key in trainer._metrics["train"])
        found.append(after)
        if size == 8:
            first = trainer.seen[0]
            for policy in ("old_per_token_logps", "ref_per_token_logps"):
                if policy in first and first[policy].shape == first["scores"].shape:
                    mask = first["completion_mask"].bool()
                    torch.testing.assert_close(first[policy][mask], first["scores"][mask], rtol=0, atol=1e-12)
            logs = trainer.state.log_history[0]
            assert logs.get("kl", 0) == pytest.approx(0, abs=1e-12) and logs.get("clip_ratio/region_mean", 0) == 0
    assert max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) < 1e-6


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "JustGRPOTrainer",
            {"schedule": "left_to_right", "schedule_args": None},
            "JustGRPOTrainer is.*written once",
        ),
        ("CJGRPOTrainer", {}, "CJGRPOTrainer is not offered.*wrote tokens for good"),
        ("TraceRLTrainer", {}, "TraceRLTrainer is not offered.*wrote tokens for good"),
        ("IGPOTrainer", {**HINTS}, "IGPOTrainer is not offered.*inpainted"),
        ("DreamCoderRLTrainer", {"substitute_groups": False}, "DreamCoderRLTrainer is not.*cart_p=0.1"),
    ],
)
def test_who_cannot_train_says_why(name: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        build(name, tmp_path, **settings)
