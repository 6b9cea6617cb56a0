"""Running confidence remasking: how many stay is given, which is decided anew at every step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.schedules.rcr import COUNTS, still_masked
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import MASK, A, B, C, D, E, always


def decoded(arguments: dict[str, Any], schedule: str = "rcr", **settings: Any) -> Rollout:
    config = DecodingConfig(**{"canvas_length": 12, "schedule": schedule, "schedule_args": arguments, **settings})
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


def left(masked: int, steps: int, counts: str, exponent: float = 2.0) -> list[int]:
    return still_masked(torch.tensor([masked]), steps, torch.arange(steps), counts, exponent).tolist()


# --- count schedules --------------------------------------------------------------------------------------------------


@given(masked=st.integers(0, 600), steps=st.integers(1, 300), counts=st.sampled_from(COUNTS))
def test_slots_only_ever_close_and_none_stays_open(masked: int, steps: int, counts: str):
    open_slots = [masked, *left(masked, steps, counts)]
    assert open_slots[-1] == 0
    assert all(a >= b >= 0 for a, b in itertools.pairwise(open_slots))


@given(masked=st.integers(0, 600), steps=st.integers(1, 300))
def test_linear_counts_are_exact(masked: int, steps: int):
    """1 - 0.9 times 10 is less than 1 in floating point."""
    assert left(masked, steps, "linear") == [masked * (steps - step - 1) // steps for step in range(steps)]


def test_a_power_of_one_is_linear():
    assert left(30, 12, "pow", 1.0) == left(30, 12, "linear")


def test_cosine_starts_slowly_and_log_fast():
    steps = 8
    cosine, log = ([32, *left(32, steps, counts)] for counts in ("cosine", "log"))
    assert [a - b for a, b in itertools.pairwise(cosine)] == [1, 2, 3, 4, 5, 5, 6, 6]
    assert [a - b for a, b in itertools.pairwise(log)] == [13, 7, 3, 3, 2, 2, 1, 1]


# --- remasking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "update", "block", "steps"),
    [
        ("linear", "last", 12, 12),
        ("linear", "min", 4, 6),
        ("cosine", "max", 6, 6),
        ("pow", "last", 4, 12),
        ("log", "max", 12, 8),
        ("exp", "min", 6, 16),
    ],
)
def test_as_many_stay_open_as_the_counts_say(counts: str, update: str, block: int, steps: int):
    rollout = decoded({"counts": counts, "update": update}, block_length=block, steps=steps, temperature=0.6)
    per_block = steps * block // 12
    after = left(block, per_block, counts)
    working = after.index(0) + 1  # the steps behind have nothing to do and are not made
    expected = [12 - block - first + n for first in range(0, 12, block) for n in after[:working]]
    masks = [(state == denoiser().config.diffusion["mask_token_id"]).sum(-1) for state in rollout.states()]
    for row in range(len(PROMPTS)):
        assert [int(state[row]) for state in masks][1:] == expected[:-1]
        assert int(rollout.trace.steps[row]) == len(expected)


def test_given_slots_are_not_counted():
    wishes = always((A, 0.9), (B, 0.3), (C, 0.8), (D, 0.7), (E, 0.2))
    rollout = hand.decode(wishes, 5, "rcr", steps=3, hints=[{1: C, 4: A}])
    assert hand.states(rollout) == [
        [MASK, C, MASK, MASK, A],
        [A, C, MASK, MASK, A],
        [A, C, C, MASK, A],
        [A, C, C, D, A],
    ]


def test_every_step_records_a_whole_prediction():
    rollout = decoded({}, block_length=6, steps=6, temperature=0.6)
    assert rollout.trace.events is not None
    commits = rollout.trace.events.of(EventKind.COMMIT)
    for step, state in enumerate(rollout.states()):
        for row, canvas in enumerate(state):
            chosen = (commits.row == row) & (commits.step == step)
            open_slots = (canvas[: 6 if step < 3 else 12] == MASK).nonzero().squeeze(-1)
            assert commits.position[chosen].tolist() == open_slots.tolist()


@pytest.mark.parametrize("confidence", ["probability", "topk_margin", "entropy"])
def test_without_context_the_same_tokens_stay_as_without_remasking(confidence: str):
    chances = [0.31, 0.82, 0.44, 0.95, 0.2, 0.63, 0.71, 0.15]
    wishes = always(*((A + i % 4, chance) for i, chance in enumerate(chances)))
    plain = hand.decode(wishes, 8, "low_confidence", steps=4)
    again = hand.decode(wishes, 8, "rcr", {"confidence": confidence}, steps=4)
    assert hand.states(again) == hand.states(plain)
    # With several blocks the old ones compete, so that the order differs, but not the text.
    blocks = hand.decode(wishes, 8, "rcr", {"confidence": confidence}, steps=4, block_length=4)
    assert torch.equal(blocks.canvas, plain.canvas)


def kept_then_dropped(canvas: tuple[int, ...]) -> list[hand.Wish]:
    if canvas == (MASK, MASK, MASK):
        return [(A, 0.9), (B, 0.5), (C, 0.4)]
    if canvas == (A, MASK, MASK):
        return [(A, 0.9), (B, 0.95), (C, 0.97)]
    assert canvas == (MASK, B, C)
    return [(D, 0.8), (B, 0.9), (C, 0.9)]


def test_a_token_that_was_kept_gives_way_to_better_ones():
    rollout = hand.decode(kept_then_dropped, 3, "rcr", steps=3)
    assert hand.states(rollout) == [[MASK] * 3, [A, MASK, MASK], [MASK, B, C], [D, B, C]]
    assert hand.happened(rollout, EventKind.REMASK) == [(0, 1, B), (0, 2, C), (1, 0, A)]


@pytest.mark.parametrize(("update", "open_slot"), [("last", 1), ("min", 1), ("max", 2)])
def test_which_of_its_confidences_counts(update: str, open_slot: int):
    """Slot 1 is first predicted with 0.85, then with 0.1; slot 2 with 0.4, then with 0.5; slot 0 stays."""

    def wishes(canvas: tuple[int, ...]) -> list[hand.Wish]:
        fresh = all(token == MASK for token in canvas)
        return [(A, 0.9), (B, 0.85 if fresh else 0.12), (C, 0.4 if fresh else 0.5)]

    rollout = hand.decode(wishes, 3, "rcr", {"update": update}, steps=3)
    assert hand.states(rollout)[2].index(MASK) == open_slot


def test_the_smallest_confidence_is_not_forgotten():
    """With 0.15 and then 0.8, slot 1 is behind slot 2 with 0.4 and then 0.5 only where the smallest counts."""

    def wishes(canvas: tuple[int, ...]) -> list[hand.Wish]:
        fresh = all(token == MASK for token in canvas)
        return [(A, 0.9), (B, 0.15 if fresh else 0.8), (C, 0.4 if fresh else 0.5)]

    found = {u: hand.states(hand.decode(wishes, 3, "rcr", {"update": u}, steps=3))[2] for u in ("last", "max", "min")}
    assert found == {"last": [A, B, MASK], "max": [A, B, MASK], "min": [A, MASK, C]}


def test_earlier_blocks_are_reopened():
    wishes = always((A, 0.9), (B, 0.3), (C, 0.8), (D, 0.7))
    rollout = hand.decode(wishes, 4, "rcr", steps=4, block_length=2)
    assert hand.states(rollout)[1:4] == [[A, MASK, MASK, MASK], [A, B, MASK, MASK], [A, MASK, C, D]]
    assert hand.states(rollout)[-1] == [A, B, C, D]


def test_confidences_of_zero_are_the_lowest():
    """Two tokens that are equally probable have no margin, which says nothing good about them."""

    def wishes(canvas: tuple[int, ...]) -> list[hand.Wish]:
        even = 1 / hand.VOCAB
        return [(A, even), (B, 0.5), (C, even), (D, 0.3)]

    rollout = hand.decode(wishes, 4, "rcr", {"confidence": "topk_margin"}, steps=4)
    found = hand.states(rollout)
    assert [[i for i, token in enumerate(state) if token != MASK] for state in found] == [
        [],
        [1],
        [1, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
    ]


def test_deferred_tokens_go_last():
    wishes = always((A, 0.9), (B, 0.5), (C, 0.4), (D, 0.3))
    rollout = hand.decode(wishes, 4, "rcr", steps=4, defer_token_ids=(A,))
    assert hand.states(rollout)[1:] == [[MASK, B, MASK, MASK], [MASK, B, C, MASK], [MASK, B, C, D], [A, B, C, D]]


# --- without remasking ------------------------------------------------------------------------------------------------


def test_without_remasking_even_counts_are_low_confidence():
    plain = {"steps": 6, "block_length": 6}
    assert_same_rows(decoded({"remask": False}, **plain), decoded({}, "low_confidence", **plain))


def test_without_remasking_the_counts_are_kept():
    rollout = decoded({"remask": False, "counts": "pow", "exponent": 3.0}, steps=6, temperature=0.7, stop_at_eos=False)
    counts = [a - b for a, b in itertools.pairwise([12, *left(12, 6, "pow", 3.0)])]
    assert 0 in counts  # such a step is made, and writes nothing
    for row in rollout.trace.commit_step:
        assert row.bincount(minlength=6).tolist() == counts
    assert rollout.nfe.tolist() == [6] * len(PROMPTS)


def test_confidence_is_that_of_the_sampling_distribution():
    """With one token left by top-k every candidate is certain, so that the first slots go first."""
    wishes = always((A, 0.2), (B, 0.9), (C, 0.5), (E, 0.7))
    assert hand.decode(wishes, 4, "rcr", {"remask": False}, steps=4).trace.commit_step.tolist() == [[3, 0, 2, 1]]
    sure = hand.decode(wishes, 4, "rcr", {"remask": False}, steps=4, top_k=1)
    assert sure.trace.commit_step.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": "square"}, "counts='square' .* linear, cosine, pow, log, exp"),
        ({"confidence": "random"}, "confidence='random' .* probability, topk_margin, entropy"),
        ({"update": ["last"]}, r"update=\['last'\] .* last, max, min"),
        ({"exponent": 0}, "exponent=0 .* above 0"),
        ({"remask": 1}, "remask=1 .* True or False"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="rcr", schedule_args=arguments)
