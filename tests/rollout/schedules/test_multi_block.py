"""d3LLM's multi-block decoding: low entropy anywhere in the open blocks, and always something in the first."""

from __future__ import annotations

from typing import Any

import pytest

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import EOS, MASK, A, B, C, D, E, always


def decoded(arguments: dict[str, Any], schedule: str = "multi_block", **settings: Any) -> Rollout:
    config = DecodingConfig(**{"canvas_length": 12, "schedule": schedule, "schedule_args": arguments, **settings})
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


def test_the_lowest_of_all_and_the_lowest_of_the_first():
    """The second block is open from the second step on; its surest slot is written besides one of the first."""
    wishes = always((A, 0.3), (B, 0.5), (C, 0.4), (D, 0.2), (E, 0.9), (A, 0.8))
    rollout = hand.decode(wishes, 6, "multi_block", {"entropy_threshold": 0.0, "add_threshold": 0.3}, block_length=3)
    assert hand.states(rollout) == [
        [MASK] * 6,
        [MASK, B, MASK, MASK, MASK, MASK],
        [MASK, B, C, MASK, E, MASK],
        [A, B, C, MASK, E, A],
        [A, B, C, D, E, A],
    ]


def test_what_has_little_entropy_goes_together():
    wishes = always((A, 0.99), (B, 0.98), (C, 0.4), (D, 0.97), (E, 0.5), (A, 0.4))
    rollout = hand.decode(wishes, 6, "multi_block", {"entropy_threshold": 0.3, "add_threshold": 0.5}, block_length=3)
    assert hand.states(rollout)[:3] == [[MASK] * 6, [A, B, MASK, MASK, MASK, MASK], [A, B, C, D, MASK, MASK]]


def test_one_block_opens_per_step():
    wishes = always(*[(A, 0.99)] * 8)
    arguments = {"entropy_threshold": 5.0, "add_threshold": 0.1}
    rollout = hand.decode(wishes, 8, "multi_block", arguments, block_length=2)
    assert rollout.trace.commit_step.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_an_end_changes_nothing_before_it():
    """Blocks behind an end are opened as if there were none: full attention would see the difference."""
    wishes = always((A, 0.4), (EOS, 0.95), (C, 0.5), (D, 0.3))
    arguments = {"entropy_threshold": 0.0, "add_threshold": 0.5}
    early = hand.decode(wishes, 4, "multi_block", arguments, block_length=2, stop_at_eos=True)
    assert hand.states(early) == [[MASK] * 4, [MASK, EOS, MASK, MASK], [A, EOS, C, EOS]]
    assert early.stop_reason == ["eos"] and early.completion_ids == [[A, EOS]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_blocks_that_open_when_the_last_is_full_are_ordinary_ones(temperature: float):
    """One at a time by entropy: the entropy bound with nothing to spare."""
    usual = {"temperature": temperature, "block_length": 4, "stop_at_eos": False}
    found = decoded({"entropy_threshold": 0.0, "add_threshold": 1.0}, **usual)
    assert_same_rows(found, decoded({"gamma": 0.0}, "entropy_bound", **usual))


@pytest.mark.parametrize("name", ["entropy_threshold", "add_threshold"])
def test_bad_settings_are_named(name: str):
    with pytest.raises(ValueError, match=f"{name}=-0.1"):
        DecodingConfig(schedule="multi_block", schedule_args={name: -0.1})
