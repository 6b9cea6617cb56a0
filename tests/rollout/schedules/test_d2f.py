"""D2F: blocks are opened ahead, written together, and stored once they and all before them are complete."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.rows import Progress
from tests.models.block_denoisers import BLOCK, PROMPTS, block_denoiser
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.examples import watched
from tests.rollout.schedules.hand_tables import EOS, MASK, A, B, C, D, E, always

ORIGINS = ("whole_prompt", "response", "position_zero")
PIPELINE = {"threshold": 0.35, "add_threshold": 0.25, "active_threshold": 0.75}


def decoded(origin: str = "whole_prompt", *, shift: int = 0, prompts: Any = None, **settings: Any) -> Rollout:
    more = {"on_step": settings.pop("on_step", None), "hints": settings.pop("hints", None)}
    usual = {"canvas_length": 16, "schedule": "d2f", "schedule_args": PIPELINE, "stop_at_eos": False}
    engine = RolloutEngine(block_denoiser("block_causal", origin, shift=shift))
    return engine.generate(prompts or PROMPTS, DecodingConfig(**{**usual, **settings}), seed=4, **more)


def test_the_next_block_is_opened_when_enough_is_written():
    """One of two slots opens the next block, at the next step; a block opened ahead writes what is sure only."""
    wishes = always((A, 0.5), (B, 0.6), (C, 0.95), (D, 0.4), (E, 0.3), (A, 0.5))
    arguments = {"threshold": 0.9, "add_threshold": 0.5, "active_threshold": 1.0}
    rollout = hand.decode(wishes, 6, "d2f", arguments, block_length=2)
    assert hand.states(rollout) == [
        [MASK] * 6,
        [MASK, B, MASK, MASK, MASK, MASK],
        [A, B, C, MASK, MASK, MASK],  # the sure one of the second block along with the last of the first
        [A, B, C, D, MASK, MASK],  # the third block was opened at this step, too
        [A, B, C, D, MASK, A],
        [A, B, C, D, E, A],
    ]


def test_a_block_goes_on_once_the_one_before_is_far_enough():
    wishes = always((A, 0.5), (B, 0.6), (C, 0.5), (D, 0.4))
    arguments = {"threshold": 0.9, "add_threshold": 0.5, "active_threshold": 0.5}
    rollout = hand.decode(wishes, 4, "d2f", arguments, block_length=2)
    assert hand.states(rollout) == [[MASK] * 4, [MASK, B, MASK, MASK], [A, B, C, MASK], [A, B, C, D]]


def test_nothing_is_opened_behind_an_end():
    wishes = always((A, 0.4), (EOS, 0.95), (C, 0.95), (D, 0.95))
    arguments = {"threshold": 0.9, "add_threshold": 0.5}
    for stop in ("block", True):
        rollout = hand.decode(wishes, 4, "d2f", arguments, block_length=2, stop_at_eos=stop)
        assert hand.states(rollout) == [[MASK] * 4, [MASK, EOS, MASK, MASK], [A, EOS, EOS, EOS]]
        assert rollout.stop_reason == ["eos"]


def test_open_blocks_are_finished_where_the_stop_waits_for_blocks():
    """The end comes in the first block while the second is open."""
    wishes = always((A, 0.95), (EOS, 0.4), (C, 0.5), (D, 0.3))
    arguments = {"threshold": 0.9, "add_threshold": 0.5, "active_threshold": 0.5}
    at_once, at_block = (
        hand.decode(wishes, 4, "d2f", arguments, block_length=2, stop_at_eos=stop) for stop in (True, "block")
    )
    assert hand.states(at_once)[-1] == [A, EOS, C, EOS] and at_once.nfe.tolist() == [2]
    assert hand.states(at_block)[-1] == [A, EOS, C, D] and at_block.nfe.tolist() == [3]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"cfg_scale": 1.5}], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("origin", ORIGINS)
def test_the_prefix_cache_is_exact(origin: str, shift: int, settings: dict[str, Any]):
    hints = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4}, {9: 3}]
    ahead: list[bool] = []

    def look(progress: Progress) -> None:
        ahead.append(bool((progress.reach > progress.stop).any()))

    plain, cached = (
        decoded(origin, shift=shift, cache=cache, hints=hints, on_step=look, **settings) for cache in ("none", "prefix")
    )
    assert_same_rows(cached, plain)
    assert cached.exact and any(ahead)


def test_what_is_fed_is_open_or_has_just_been_finished():
    """Forwards run from the block that was the first unfinished one a step ago to the last open one."""
    seen: list[Progress] = []
    model = block_denoiser("block_causal", "whole_prompt", shift=0)  # the very one that decodes
    prompt = PROMPTS[1]
    with watched(model) as fed:
        decoded(prompts=[prompt], cache="prefix", on_step=seen.append)
    expected, before = [], 0
    for progress in seen:
        start = int(progress.start)
        expected.append(int(progress.reach) - before + (len(prompt) if not expected else 0))
        before = start
    assert [call["input_ids"].shape[1] for call in fed] == expected
    assert sum(expected) < len(seen) * len(prompt)  # far less than whole rows


def test_the_whole_prompt_is_one_block():
    """A prompt token sees the last one of a prompt that is longer than a block, and nothing of the canvas."""
    model = block_denoiser("block_causal", "whole_prompt")
    prompt = PROMPTS[1]
    assert len(prompt) > 2 * BLOCK
    keys = torch.ones(1, len(prompt) + 4).bool()
    scored = torch.zeros_like(keys)
    scored[0, 0] = True
    tokens = torch.tensor([[*prompt, MASK, MASK, MASK, MASK]])

    def first(tokens: torch.Tensor) -> float:
        found, *_ = model(
            input_ids=tokens,
            attention_mask=keys,
            score_positions=scored,
            score_targets=torch.zeros_like(tokens),
            score_prompt_lengths=torch.tensor([len(prompt)]),
        )
        return float(found)

    late, canvas = tokens.clone(), tokens.clone()
    late[0, len(prompt) - 1], canvas[0, -1] = 3, 3
    with torch.no_grad():
        assert first(late) != first(tokens) == first(canvas)


@pytest.mark.parametrize("name", ["threshold", "add_threshold", "active_threshold"])
def test_bad_settings_are_named(name: str):
    with pytest.raises(ValueError, match=f"{name}=-0.1"):
        DecodingConfig(schedule="d2f", schedule_args={name: -0.1})
