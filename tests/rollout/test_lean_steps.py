"""What a step of a fixed schedule costs besides the trunk, counted: few operations, and few waits for the device."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.counting import Costs, costs
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine

LENGTH = 64


def of_a_run(steps: int, rows: int, **settings: Any) -> Costs:
    model = tiny_llada(vocab_size=64)
    engine = RolloutEngine(model)
    config = DecodingConfig(canvas_length=LENGTH, block_length=LENGTH, min_new_tokens=LENGTH, steps=steps, **settings)
    with costs(model.base_model) as counted:
        engine.generate([[5, 6, 7]] * rows, config)
    return counted


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9}, {"schedule": "random"}], ids=["greedy", "drawn", "random"]
)
def test_a_step_waits_little_and_does_little(settings: dict[str, Any], cache: str, rows: int):
    """The difference of two runs is that of their steps: what begins and ends a run is in both."""
    few, many = (of_a_run(steps, rows, cache=cache, **settings) for steps in (LENGTH // 2, LENGTH))
    steps = LENGTH - LENGTH // 2
    assert ((many.waits - few.waits).total()) / steps <= 6
    assert ((many.operations - few.operations).total()) / steps <= 200
