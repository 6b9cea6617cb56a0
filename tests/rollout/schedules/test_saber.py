"""Saber: surer means faster, and what has lost most is taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from tests.rollout.denoisers import PROMPTS, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import MASK, A, B, C, D, E, Wish, always


def decoded(arguments: dict[str, Any], **settings: Any) -> Rollout:
    config = DecodingConfig(**{"canvas_length": 12, "schedule": "saber", "schedule_args": arguments, **settings})
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


def falling(canvas: tuple[int, ...]) -> list[Wish]:
    """Once the first two are written, both lose, the first more, though it stays the more probable one."""
    if canvas == (MASK,) * 5:
        return [(A, 0.9), (B, 0.8), (C, 0.3), (D, 0.2), (D, 0.15)]
    if canvas == (A, B, MASK, MASK, MASK):
        return [(A, 0.7), (B, 0.65), (C, 0.3), (D, 0.2), (D, 0.15)]
    if canvas == (MASK, B, C, D, MASK):
        return [(E, 0.95), (B, 0.9), (C, 0.9), (D, 0.9), (E, 0.6)]
    raise AssertionError(canvas)


def test_what_has_lost_most_is_taken_back():
    rollout = hand.decode(falling, 5, "saber")
    assert hand.states(rollout) == [[MASK] * 5, [A, B, MASK, MASK, MASK], [MASK, B, C, D, MASK], [E, B, C, D, E]]
    assert hand.happened(rollout, EventKind.REMASK) == [(1, 0, A)]


def test_it_is_the_held_token_that_loses():
    """The model becomes surer of slot 0, but of another token: what is held there has lost most."""

    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        if canvas[0] == A:
            return [(E, 0.95), (B, 0.75), (C, 0.3), (D, 0.2), (D, 0.15)]
        return [(A, 0.9), (B, 0.8), (C, 0.3), (D, 0.2), (D, 0.15)]

    rollout = hand.decode(wishes, 5, "saber")
    assert hand.happened(rollout, EventKind.REMASK)[0] == (1, 0, A)


def test_tokens_of_the_same_step_stay():
    rollout = hand.decode(always((A, 0.9), (B, 0.2), (C, 0.15), (D, 0.12)), 4, "saber", {"min_tokens": 3})
    assert hand.states(rollout) == [[MASK] * 4, [A, B, C, MASK], [A, B, C, D]]


def test_what_exceeds_the_mean_goes_together():
    wishes = always((A, 0.5), (B, 0.6), (C, 0.35), (D, 0.2), (E, 0.3), (A, 0.55), (B, 0.9))
    rollout = hand.decode(wishes, 7, "saber", {"min_tokens": 1, "backtrack": False})
    # The means are 1 (nothing yet), 0.9, 0.75, ... until the best left exceeds nothing: one at a time,
    assert rollout.trace.commit_step.tolist() == [[3, 1, 4, 6, 5, 2, 0]]

    def surer(canvas: tuple[int, ...]) -> list[Wish]:
        return [
            (A, 0.3),
            *([(B, 0.2)] * 5 if canvas[0] == MASK else [(B, 0.4), (C, 0.6), (D, 0.31), (E, 0.2), (A, 0.9)]),
        ]

    rollout = hand.decode(surer, 6, "saber", {"min_tokens": 1, "backtrack": False})
    # ... but all four at once that are surer than the first was. The mean is then 0.502, and 0.2 below it.
    assert rollout.trace.commit_step.tolist() == [[0, 1, 1, 1, 2, 1]]


def test_the_last_step_of_a_block_takes_nothing_back():
    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        fresh = canvas[0] == MASK
        return [(A, 0.9), (B, 0.8), (C, 0.3), (D, 0.2)] if fresh else [(E, 0.9), (E, 0.9), (C, 0.3), (D, 0.2)]

    rollout = hand.decode(wishes, 4, "saber")
    assert hand.states(rollout)[1:] == [[A, B, MASK, MASK], [A, B, C, D]]


@pytest.mark.parametrize(("least", "committed", "taken"), [(2, 2, 1), (2, 9, 2), (6, 6, 3), (1, 1, 0), (1, 2, 1)])
def test_how_many_are_taken_back(least: int, committed: int, taken: int):
    """The first step writes `least`, the second `committed` surer ones; one slot is open still, and the first lose."""

    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        if all(token == MASK for token in canvas):
            return [(A, 0.5)] * least + [(B, 0.1)] * committed + [(C, 0.1)]
        return [(A, 0.3)] * least + [(B, 0.9)] * committed + [(C, 0.1)]

    rollout = hand.decode(wishes, least + committed + 1, "saber", {"min_tokens": least})
    steps = {kind: [step for step, _, _ in hand.happened(rollout, kind)] for kind in EventKind}
    assert [steps[EventKind.COMMIT].count(step) for step in (0, 1)] == [least, committed]
    assert [steps[EventKind.REMASK].count(step) for step in (0, 1)] == [0, taken]


@pytest.mark.parametrize("settings", [{}, {"block_length": 6}, {"block_length": 6, "temperature": 0.8}])
def test_every_step_gains_and_finished_blocks_stay(settings: dict[str, Any]):
    rollout = decoded({"min_tokens": 2}, stop_at_eos=False, **settings)
    events = rollout.trace.events
    assert events is not None and len(events.of(EventKind.REMASK))
    block = settings.get("block_length", 12)
    for row in range(len(PROMPTS)):
        for step in range(int(rollout.trace.steps[row])):
            here = (events.row == row) & (events.step == step)
            commits, remasks = (events.position[here & (events.kind == kind)] for kind in (0, 1))
            assert len(commits) > len(remasks)
            assert set((remasks // block).tolist()) <= set((commits // block).tolist())


def test_without_going_back_each_slot_is_written_once():
    rollout = decoded({"backtrack": False}, stop_at_eos=False)
    assert rollout.trace.events is None
    for row in rollout.trace.commit_step:
        assert row.bincount()[:-1].min() >= 2


@pytest.mark.parametrize("chances", [(0.9, 0.8, 0.7, 0.6), (0.2, 0.5, 0.3, 0.4)])
def test_with_one_token_at_least_a_falling_confidence_is_one_token_per_step(chances: tuple[float, ...]):
    wishes = always(*((A, chance) for chance in chances))
    one = hand.decode(wishes, 4, "saber", {"min_tokens": 1})
    plain = hand.decode(wishes, 4, "low_confidence", steps=4)
    assert torch.equal(one.canvas, plain.canvas)
    assert torch.equal(one.trace.commit_step, plain.trace.commit_step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"min_tokens": 0}, "min_tokens=0 .* 1 or larger"), ({"backtrack": "no"}, "backtrack='no' .* True or False")],
)
def test_bad_settings(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="saber", schedule_args=arguments)
