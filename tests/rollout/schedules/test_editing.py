"""Editing: written tokens give way to others that the model has become sure of, in the active block alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from tests.models.block_denoisers import LENGTH as BLOCKS_LENGTH, PROMPTS as BLOCKS_PROMPTS, block_denoiser
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import EOS, MASK, A, B, C, D, Wish, always


def decoded(schedule: str, arguments: dict[str, Any], **settings: Any) -> Rollout:
    config = DecodingConfig(**{"canvas_length": 12, "schedule": schedule, "schedule_args": arguments, **settings})
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


def changes_its_mind(canvas: tuple[int, ...]) -> list[Wish]:
    """Slot 0 wants A at first, then C with 0.7."""
    return [(A, 0.9), (B, 0.8)] if canvas[0] == MASK else [(C, 0.7), (B, 0.8)]


def test_a_token_is_replaced_when_another_is_sure_enough():
    rollout = hand.decode(changes_its_mind, 2, "editing", steps=2)
    assert hand.states(rollout) == [[MASK, MASK], [A, MASK], [C, B], [C, B]]
    assert hand.happened(rollout, EventKind.REPLACE) == [(1, 0, C)]
    assert rollout.trace.commit_step.tolist() == [[1, 1]]
    torch.testing.assert_close(rollout.trace.raw_log_prob[0].exp(), torch.tensor([0.7, 0.8]).double())


@pytest.mark.parametrize("arguments", [{"editing_threshold": 0.71}, {"editing_threshold": 1.0}])
def test_a_token_stays_when_the_other_is_not(arguments: dict[str, Any]):
    rollout = hand.decode(changes_its_mind, 2, "editing", arguments, steps=2)
    assert hand.states(rollout) == [[MASK, MASK], [A, MASK], [A, B], [A, B]]


@pytest.mark.parametrize(("post_steps", "forwards"), [(0, 2), (1, 3), (16, 3)])
def test_a_step_without_an_edit_ends_the_block(post_steps: int, forwards: int):
    rollout = hand.decode(changes_its_mind, 2, "editing", {"max_post_steps": post_steps}, steps=2)
    assert rollout.nfe.tolist() == [forwards]


def never_content(canvas: tuple[int, ...]) -> list[Wish]:
    return [(B, 0.9) if canvas[0] == A else (A, 0.9), (C, 0.8), (D, 0.8), (EOS, 0.8)]


@pytest.mark.parametrize("post_steps", [0, 1, 5])
def test_two_tokens_that_alternate_are_stopped(post_steps: int):
    """Each of the two blocks has two steps that fill it, and as many more as are allowed: slot 0 is in the first."""
    rollout = hand.decode(never_content, 4, "editing", {"max_post_steps": post_steps}, steps=4, block_length=2)
    first = 2 + post_steps
    second = 2 + min(1, post_steps)
    assert rollout.nfe.tolist() == [first + second]
    # Slot 0 is written at the first step and replaced at every other one of its block, and left alone in the second.
    assert hand.happened(rollout, EventKind.REPLACE) == [(step, 0, B if step % 2 else A) for step in range(1, first)]
    assert rollout.canvas[0].tolist() == [B if first % 2 == 0 else A, C, D, EOS]


def test_a_block_is_over_before_its_end_of_sequence_counts():
    """Slot 1 is an end at first, and the block full: it is edited before the row can stop."""

    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        return [(A, 0.9), (EOS, 0.6) if MASK in canvas[:2] else (B, 0.9), (C, 0.9), (EOS, 0.9)]

    rollout = hand.decode(wishes, 4, "editing", steps=4, block_length=2, stop_at_eos=True)
    assert rollout.canvas.tolist() == [[A, B, C, EOS]]
    assert rollout.stop_reason == ["complete"]
    kept = hand.decode(wishes, 4, "editing", {"max_post_steps": 0}, steps=4, block_length=2, stop_at_eos=True)
    assert kept.canvas.tolist() == [[A, EOS, EOS, EOS]]
    assert (kept.stop_reason, kept.nfe.tolist()) == (["eos"], [2])


def test_given_tokens_are_not_edited():
    rollout = hand.decode(always((A, 0.9), (B, 0.9), (C, 0.9)), 3, "editing", hints=[{1: D}])
    assert rollout.canvas.tolist() == [[A, D, C]]
    assert rollout.nfe.tolist() == [3]  # nor waited for: two steps fill the others, one finds nothing to edit
    assert not hand.happened(rollout, EventKind.REPLACE)


@pytest.mark.parametrize("settings", [{"steps": 6}, {"steps": 9, "block_length": 4, "temperature": 0.7}])
def test_without_editing_it_is_dynamic_decoding(settings: dict[str, Any]):
    never = decoded("editing", {"threshold": 0.6, "editing_threshold": 1.0, "max_post_steps": 0}, **settings)
    plain = decoded("sdar_dynamic", {"threshold": 0.6}, **settings)
    assert torch.equal(never.valid, plain.valid)
    assert torch.equal(never.canvas[never.valid], plain.canvas[plain.valid])
    full = [
        decoded(name, args, **settings, stop_at_eos=False)
        for name, args in (
            ("editing", {"threshold": 0.6, "editing_threshold": 1.0, "max_post_steps": 0}),
            ("sdar_dynamic", {"threshold": 0.6}),
        )
    ]
    assert_same_rows(*full)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_models_with_blocks_are_cached_exactly(temperature: float):
    """LLaDA2's own setting: the block is fed again and again, what is before it is stored."""
    settings = {"threshold": 0.5, "editing_threshold": 0.2, "max_post_steps": 3}
    runs = []
    for cache in ("none", "prefix"):
        config = DecodingConfig(
            canvas_length=BLOCKS_LENGTH,
            schedule="editing",
            temperature=temperature,
            schedule_args=settings,
            cache=cache,
        )
        runs.append(
            RolloutEngine(block_denoiser("block_causal", "position_zero")).generate(BLOCKS_PROMPTS, config, seed=2)
        )
    whole, cached = runs
    assert whole.trace.events is not None and len(whole.trace.events.of(EventKind.REPLACE))
    assert cached.exact
    assert_same_rows(cached, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": "high"}, "threshold='high' .* 0 or larger"),
        ({"editing_threshold": -0.5}, "editing_threshold=-0.5 .* 0 or larger"),
        ({"max_post_steps": -1}, "max_post_steps=-1 .* 0 or larger"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="editing", schedule_args=arguments)
