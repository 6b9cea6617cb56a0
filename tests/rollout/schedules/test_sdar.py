"""SDAR's dynamic decoding: an even share, or everything that is sure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import A, B, C, D, always


def decoded(schedule: str, arguments: dict[str, Any], **settings: Any) -> Rollout:
    config = DecodingConfig(**{"canvas_length": 12, "schedule": schedule, "schedule_args": arguments, **settings})
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


@pytest.mark.parametrize("settings", [{"steps": 6}, {"steps": 9, "block_length": 4}])
@pytest.mark.parametrize("threshold", [math.inf, 1.0])
def test_when_nothing_exceeds_the_threshold_it_is_even(threshold: float, settings: dict[str, Any]):
    same = decoded("sdar_dynamic", {"threshold": threshold}, **settings)
    assert_same_rows(same, decoded("low_confidence", {}, **settings))


def test_at_zero_a_block_takes_one_step():
    assert (
        decoded("sdar_dynamic", {"threshold": 0.0}, steps=12, block_length=4, stop_at_eos=False).nfe.tolist() == [3] * 5
    )


def test_all_that_is_sure_goes_if_it_is_enough():
    wishes = always((A, 0.9), (B, 0.5), (C, 0.88), (D, 0.4))
    assert hand.decode(wishes, 4, "sdar_dynamic", steps=4).trace.commit_step.tolist() == [[0, 1, 0, 2]]
    # Three are due at the first of two steps of five, and two are sure: the third is the best of the others.
    wishes = always((A, 0.9), (B, 0.5), (C, 0.88), (D, 0.4), (A, 0.3))
    assert hand.decode(wishes, 5, "sdar_dynamic", steps=2).trace.commit_step.tolist() == [[0, 0, 0, 1, 1]]


def test_the_threshold_is_exceeded_not_reached():
    even = 1 / hand.VOCAB
    wishes = always((A, even), (A, even), (A, even))
    above = hand.decode(wishes, 3, "sdar_dynamic", {"threshold": even * 0.999}, steps=3)
    assert above.nfe.tolist() == [1]
    sure = hand.decode(wishes, 3, "sdar_dynamic", {"threshold": 1.0}, steps=3, temperature=1.0, top_k=1)
    assert sure.nfe.tolist() == [3]


def test_confidence_is_that_of_the_distribution_drawn_from():
    wishes = always((A, 0.4), (B, 0.3), (C, 0.5), (D, 0.2))
    assert hand.decode(wishes, 4, "sdar_dynamic", steps=4).nfe.tolist() == [4]
    assert hand.decode(wishes, 4, "sdar_dynamic", steps=4, temperature=1.0, top_k=1).nfe.tolist() == [1]
    assert hand.decode(wishes, 4, "sdar_dynamic", steps=4, temperature=0.2).nfe.tolist() == [1]


def test_rows_that_start_in_a_block_share_out_what_is_open():
    """Of a block of four, two slots are given: two steps are enough for the rest."""
    wishes = always((A, 0.4), (B, 0.3), (C, 0.5), (D, 0.2))
    rollout = hand.decode(wishes, 4, "sdar_dynamic", steps=4, hints=[{0: A, 1: B}])
    assert rollout.trace.commit_step.tolist() == [[-1, -1, 0, 1]]


def test_bad_settings():
    with pytest.raises(ValueError, match=r"threshold=-0\.1 .* 0 or larger"):
        DecodingConfig(schedule="sdar_dynamic", schedule_args={"threshold": -0.1})
    assert torch.isfinite(torch.tensor(DecodingConfig(schedule="sdar_dynamic").arguments().threshold))
