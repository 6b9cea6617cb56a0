"""What holds for every algorithm with a baseline: what all rewards of a group have in common teaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.algorithms.bgpo import BGPOTrainer
from rl4dlm.algorithms.coupled_grpo import CoupledGRPOTrainer
from rl4dlm.algorithms.diffu_grpo import DiffuGRPOTrainer
from rl4dlm.algorithms.diffusion_gdpo import DiffusionGDPOTrainer
from rl4dlm.algorithms.dmpo import DMPOTrainer
from rl4dlm.algorithms.espo import ESPOTrainer
from rl4dlm.algorithms.justgrpo import JustGRPOTrainer
from rl4dlm.algorithms.spg import SPGTrainer
from rl4dlm.algorithms.stabledrl import StableDRLTrainer
from rl4dlm.algorithms.unigrpo import UniGRPOTrainer
from rl4dlm.algorithms.wd1 import WD1Trainer
from tests.training.conftest import reward
from tests.training.steps import one_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TRAINERS: list[type] = [
    DiffuGRPOTrainer,
    CoupledGRPOTrainer,
    UniGRPOTrainer,
    ESPOTrainer,
    DiffusionGDPOTrainer,
    BGPOTrainer,
    JustGRPOTrainer,
    SPGTrainer,
    StableDRLTrainer,
    WD1Trainer,
    DMPOTrainer,
]


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_what_rewards_have_in_common_changes_nothing(make_trainer: Any, trainer: type) -> None:
    settings: dict[str, Any] = {"denoising_steps": 8 if trainer is JustGRPOTrainer else 2}
    if issubclass(trainer, SPGTrainer):
        settings["block_length"] = 4

    def step(rewards: Any) -> dict[str, torch.Tensor]:
        return one_step(make_trainer, trainer, rewards=rewards, beta=0.0, num_iterations=1, **settings)[1]

    plain = step(reward)
    shifted = step(lambda completions, **columns: [r + 3.0 for r in reward(completions)])
    equal = step(lambda completions, **columns: [3.0] * len(completions))
    size = max(gradient.abs().max() for gradient in plain.values())
    assert size > 1e-4
    for name, gradient in plain.items():
        torch.testing.assert_close(shifted[name], gradient, rtol=1e-3, atol=2e-3 * float(size), msg=name)
        assert equal[name].abs().max() < 1e-5 * max(1.0, float(size)), name
