"""Training on rollouts of schedules that write in a part of a block, or in a window that moves."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rl4dlm.models.tiny import tiny_llada

CASES = {
    "sliding_window": ({"attention": "written_first"}, {"window": 3}),
    "sub_blocks": (
        {"attention": "block_causal", "block_length": 4, "grid_origin": "position_zero", "logit_shift": 1},
        {"sub_block_length": 2},
    ),
    "multi_block": ({}, {"add_threshold": 0.5}),
}


@pytest.mark.parametrize("schedule", CASES)
def test_a_step_is_trained(make_trainer: Any, losses: Any, schedule: str) -> None:
    spec, arguments = CASES[schedule]
    model = tiny_llada()
    model.config.diffusion.update(spec)
    block = {"block_length": 4} if schedule == "multi_block" else {}
    trainer = make_trainer(
        model, schedule=schedule, schedule_args=arguments, denoising_steps=None, max_steps=1, **block
    )
    trainer.train()
    assert losses(trainer) and all(math.isfinite(loss) for loss in losses(trainer))
