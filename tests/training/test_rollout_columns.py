"""A11: reward functions see how a completion was decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rl4dlm import load_reward
from rl4dlm.rollout.rollout import Rollout


def test_a11_rewards_get_a_value_per_completion(make_trainer: Callable[..., Any]) -> None:
    seen: list[dict[str, Any]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.append(columns)
        return [float(i % 2) for i in range(len(completions))]

    make_trainer(rewards=reward, max_steps=1, denoising_steps=4, stop_at_eos=False).train()
    found = seen[0]
    assert found["nfe"] == [4] * 8 and found["denoising_steps"] == [4] * 8
    assert found["tokens_per_forward"] == [2.0] * 8
    assert found["stop_reason"] == ["complete"] * 8
    assert "rollout" not in found, "only for those who name it"


def test_a11_the_rollout_goes_to_those_who_name_it(make_trainer: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def of_rollout(completions: list[str], rollout: Rollout, **columns: Any) -> list[float]:
        seen.append((rollout, columns["nfe"], columns["completion_ids"]))
        return [float(i) for i in range(len(completions))]

    def of_text(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    make_trainer(rewards=[of_text, of_rollout], max_steps=1).train()
    rollout, nfe, ids = seen[0]
    assert isinstance(rollout, Rollout) and rollout.nfe.tolist() == nfe
    assert [list(row) for row in rollout.completion_ids] == [list(row) for row in ids]


def test_a11_speed_pays_for_fewer_forwards_at_equal_correctness() -> None:
    speed = load_reward("speed")
    puzzle, right, wrong = "1000000000000000", "1234341221434321", "1234341221434322"
    found = speed(prompts=["?"] * 3, completions=[right, right, wrong], puzzle=[puzzle] * 3, nfe=[4, 16, 1])
    assert found == [0.25, 0.0625, 0.0]
    with pytest.raises(ValueError, match="speed needs nfe"):
        speed(prompts=["?"], completions=[right], puzzle=[puzzle])
