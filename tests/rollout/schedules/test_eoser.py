"""EOSER changes the order alone; ascending steps double."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.eoser import Ascent
from rl4dlm.rollout.schedules.parts import Schedule
from tests.rollout.denoisers import EOS, PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import A, B, always


def decoded(schedule: str, arguments: dict[str, Any], **settings: Any) -> Rollout:
    config = DecodingConfig(**{"canvas_length": 12, "schedule": schedule, "schedule_args": arguments, **settings})
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


def schedule_of(schedule: str, arguments: dict[str, Any], **settings: Any) -> Schedule:
    built = DecodingConfig(schedule=schedule, schedule_args=arguments, **settings).build_schedule()
    assert isinstance(built, Schedule)
    return built


def factors(schedule: Schedule, places: list[tuple[int, int]]) -> list[float]:
    """What the confidence of an end of sequence is multiplied by, for blocks and steps in them."""
    found = []
    for block, step in places:
        view = SimpleNamespace(
            drawn=SimpleNamespace(token=torch.tensor([[EOS, 5]]), confidence=torch.tensor([[1.0, 0.25]]).double()),
            is_eos=lambda tokens: tokens == EOS,
            block=torch.tensor([block]),
            step=torch.tensor([step]),
        )
        scores = schedule.confidence(view)[0].tolist()
        assert scores[1] == 0.25
        found.append(scores[0])
    return found


# --- EOSER ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"steps": 6}, {"steps": 12, "block_length": 4, "temperature": 0.8}])
def test_factors_of_one_are_low_confidence(settings: dict[str, Any]):
    same = decoded("eoser", {"min_gamma": 1.0, "max_gamma": 1.0}, **settings)
    assert_same_rows(same, decoded("low_confidence", {}, **settings))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_ends_among_the_candidates_it_is_low_confidence(temperature: float):
    settings = {"steps": 6, "temperature": temperature, "suppress_token_ids": (EOS,)}
    assert_same_rows(decoded("eoser", {"min_gamma": 0.0}, **settings), decoded("low_confidence", {}, **settings))


def test_ends_wait_until_the_factor_lets_them():
    wishes = always((A, 0.5), (EOS, 0.9), (A, 0.6), (EOS, 0.8))
    plain = hand.decode(wishes, 4, "low_confidence", steps=4)
    late = hand.decode(wishes, 4, "eoser", {"min_gamma": 0.1}, steps=4)
    assert plain.trace.commit_step.tolist() == [[3, 0, 2, 1]]
    # The factors are 0.1, 0.4, 0.7 and 1: the first end waits for 0.7 * 0.9, when nothing else is left.
    assert late.trace.commit_step.tolist() == [[1, 2, 0, 3]]
    assert torch.equal(plain.canvas, late.canvas)
    assert plain.canvas.tolist() == [[A, EOS, A, EOS]]


def test_a_factor_of_zero_writes_no_end_while_there_is_something_else():
    wishes = always((EOS, 0.99), (B, 0.1), (EOS, 0.9))
    assert hand.decode(wishes, 3, "eoser", {"min_gamma": 0.0}, steps=3).trace.commit_step.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_factor_rises_evenly_to_its_maximum_in_every_block(blocks: int):
    schedule = schedule_of(
        "eoser", {"min_gamma": 0.4, "max_gamma": 0.9}, canvas_length=12, block_length=12 // blocks, steps=12
    )
    steps = 12 // blocks
    for block in range(blocks):
        found = factors(schedule, [(block, step) for step in range(steps)])
        assert found == pytest.approx([0.4 + 0.5 * step / (steps - 1) for step in range(steps)])


def test_one_step_per_block_needs_no_factor():
    schedule = schedule_of("eoser", {"min_gamma": 0.4, "max_gamma": 0.9}, canvas_length=4, block_length=2, steps=2)
    assert factors(schedule, [(0, 0), (1, 0)]) == [0.9, 0.9]


# --- ascending step sizes ---------------------------------------------------------------------------------------------


@given(length=st.integers(2, 2048), data=st.data())
def test_ascending_blocks_and_steps_fill_the_canvas(length: int, data: st.DataObject):
    ascent = Ascent(length, data.draw(st.integers(1, length.bit_length() - 1)))
    assert 2**ascent.steps <= length < 2 ** (ascent.steps + 1)
    assert sum(ascent.block_lengths) == length
    assert len(ascent.block_lengths) == ascent.num_blocks
    assert ascent.first_steps + ascent.num_blocks - 1 == ascent.steps
    # Every step writes twice what the one before did, the last one what is left, which is more than that.
    *before, last = ([2**j for j in range(ascent.first_steps)] + ascent.block_lengths[1:])[: ascent.steps]
    assert before == [2**j for j in range(ascent.steps - 1)]
    assert last >= 2 ** (ascent.steps - 1)


@pytest.mark.parametrize(
    ("length", "num_blocks", "counts", "lengths"),
    [
        (128, 1, [1, 2, 4, 8, 16, 32, 65], [128]),
        (128, 4, [1, 2, 4, 8, 16, 32, 65], [15, 16, 32, 65]),
        (40, 2, [1, 2, 4, 8, 25], [15, 25]),
        (32, 5, [1, 2, 4, 8, 17], [1, 2, 4, 8, 17]),
        (256, 1, [1, 2, 4, 8, 16, 32, 64, 129], [256]),
        (3, 1, [3], [3]),
        (2, 1, [2], [2]),
        (1, 1, [1], [1]),
    ],
)
def test_steps_double(length: int, num_blocks: int, counts: list[int], lengths: list[int]):
    rollout = hand.decode(always(*[(A, 0.5)] * length), length, "ass", {"num_blocks": num_blocks})
    commit_step = rollout.trace.commit_step[0]
    assert commit_step.bincount().tolist() == counts
    assert rollout.nfe.tolist() == [len(counts)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for end, following in zip(ends, [*ends[1:], length], strict=True):  # blocks are written one after another
        assert not len(commit_step[end:following]) or commit_step[:end].max() < commit_step[end:following].min()


def test_the_most_confident_go_first():
    wishes = always((A, 0.2), (A, 0.3), (A, 0.9), (A, 0.4), (A, 0.8), (A, 0.1), (A, 0.7), (A, 0.6))
    assert hand.decode(wishes, 8, "ass").trace.commit_step.tolist() == [[2, 2, 0, 2, 1, 2, 1, 2]]


def test_given_slots_leave_less_to_the_last_step():
    hints = [{0: B, 5: B, 6: B}]
    rollout = hand.decode(always(*[(A, 0.5)] * 8), 8, "ass", hints=hints)
    assert rollout.trace.commit_step.tolist() == [[-1, 0, 1, 1, 2, -1, -1, 2]]


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_factors_of_one_are_plain_ascending_steps(num_blocks: int):
    ones = {"num_blocks": num_blocks, "min_gamma": 1.0, "max_gamma": 1.0}
    assert_same_rows(
        decoded("eoser_ass", ones, temperature=0.7), decoded("ass", {"num_blocks": num_blocks}, temperature=0.7)
    )


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_the_factor_follows_the_share_that_is_written(num_blocks: int):
    schedule = schedule_of("eoser_ass", {"num_blocks": num_blocks, "min_gamma": 0.0}, canvas_length=40)
    first = 5 - num_blocks + 1
    places = [(0, step) for step in range(first)] + [(block, 0) for block in range(1, num_blocks)]
    assert factors(schedule, places) == [1 / 32, 3 / 32, 7 / 32, 15 / 32, 31 / 32]


def test_ends_wait_for_a_later_step():
    wishes = always((EOS, 0.9), (A, 0.3), (EOS, 0.8), (A, 0.2), (A, 0.1), (EOS, 0.95), (EOS, 0.6), (EOS, 0.7))
    assert hand.decode(wishes, 8, "ass").trace.commit_step.tolist() == [[1, 2, 1, 2, 2, 0, 2, 2]]
    # 0.01 + 0.99 * 1/8 and 3/8 are factors of 0.134 and 0.381.
    assert hand.decode(wishes, 8, "eoser_ass").trace.commit_step.tolist() == [[1, 0, 2, 2, 2, 1, 2, 2]]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "arguments", "settings", "message"),
    [
        ("eoser", {"min_gamma": -0.1}, {}, "min_gamma=-0.1 .* 0 to 1"),
        ("eoser", {"min_gamma": 0.9, "max_gamma": 0.5}, {}, "min_gamma=0.9 .* max_gamma=0.5"),
        ("eoser_ass", {"max_gamma": 1.5}, {}, "max_gamma=1.5 .* 0 to 1"),
        ("ass", {"num_blocks": 0}, {}, "num_blocks=0 .* 1 or larger"),
        ("ass", {"num_blocks": 4}, {"canvas_length": 12}, "num_blocks=4 .* 3 steps"),
        ("eoser_ass", {}, {"canvas_length": 12, "block_length": 4}, "block_length=4 has no meaning"),
        ("ass", {}, {"steps": 7}, "steps=7 has no meaning"),
    ],
)
def test_bad_settings(schedule: str, arguments: dict[str, Any], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule=schedule, schedule_args=arguments, **settings)


def test_models_with_blocks_of_their_own_are_refused():
    spec = DiffusionSpec(mask_token_id=2, eos_token_ids=(1,), attention="block_causal", block_length=4)
    with pytest.raises(ValueError, match="chooses its own blocks"):
        DecodingConfig(schedule="ass", canvas_length=16).for_model(spec)
