"""Fast-dLLM v2's sub-blocks, and the first token of a block, which the finished block before it predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.models.block_denoisers import BLOCK, LENGTH, MASK as BLANK, PROMPTS, block_denoiser, block_of, logits_of
from tests.rollout.denoisers import PROMPTS as OTHER_PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import MASK, A, B, C, D, E, always


def decoded(origin: str = "position_zero", kind: str = "block_causal", **settings: Any) -> Rollout:
    arguments = {"sub_block_length": 2, "threshold": 0.4, **settings.pop("schedule_args", {})}
    hints = settings.pop("hints", None)
    usual = {"canvas_length": LENGTH, "schedule": "sub_blocks", "schedule_args": arguments, "stop_at_eos": False}
    engine = RolloutEngine(block_denoiser(kind, origin, shift=1))
    return engine.generate(PROMPTS, DecodingConfig(**{**usual, **settings}), seed=4, hints=hints)


def test_sub_blocks_are_filled_one_after_another():
    wishes = always((A, 0.5), (B, 0.6), (C, 0.95), (D, 0.96), (E, 0.3))
    rollout = hand.decode(wishes, 5, "sub_blocks", {"sub_block_length": 2, "threshold": 0.9, "first_alone": False})
    assert hand.states(rollout) == [
        [MASK] * 5,
        [MASK, B, MASK, MASK, MASK],
        [A, B, MASK, MASK, MASK],
        [A, B, C, D, MASK],
        [A, B, C, D, E],
    ]


def test_the_first_token_of_a_block_is_written_alone():
    wishes = always((A, 0.95), (B, 0.95), (C, 0.95), (D, 0.95), (E, 0.95), (A, 0.95))
    rollout = hand.decode(wishes, 6, "sub_blocks", {"sub_block_length": 3}, block_length=3)
    assert rollout.trace.commit_step.tolist() == [[0, 1, 1, 2, 3, 3]]
    given = hand.decode(wishes, 6, "sub_blocks", {"sub_block_length": 3}, block_length=3, hints=[{3: B}])
    assert given.trace.commit_step.tolist() == [[0, 1, 1, -1, 2, 2]]


@pytest.mark.parametrize("origin", ["position_zero", "response"])
def test_first_tokens_come_from_the_finished_block_before(origin: str):
    """Their log-probability is that of the row before the block, which does not see it."""
    rollout, model = decoded(origin, temperature=1.0), block_denoiser("block_causal", origin, shift=1)
    spec, found = DiffusionSpec.of(model), 0
    assert spec.block_length == BLOCK
    for row, prompt in enumerate(PROMPTS):
        canvas = rollout.canvas[row].tolist()
        steps = rollout.trace.commit_step[row].tolist()
        blocks = [block_of(spec, len(prompt), place) for place in range(len(prompt) + LENGTH)]
        for slot in range(LENGTH):
            place = len(prompt) + slot
            if blocks[place] == blocks[place - 1]:
                continue
            found += 1
            assert steps.count(steps[slot]) == 1, "it is alone"
            state = [*prompt, *canvas[:slot], *[BLANK] * (LENGTH - slot)]
            with torch.no_grad():
                expected = logits_of(model, len(prompt), state, blocks[place]).log_softmax(-1)[place, canvas[slot]]
                causal = logits_of(model, len(prompt), [*state[:place], BLANK], blocks[place]).log_softmax(-1)
            assert rollout.trace.raw_log_prob[row, slot] == pytest.approx(float(expected), abs=1e-10)
            assert rollout.trace.raw_log_prob[row, slot] == pytest.approx(float(causal[place, canvas[slot]]), abs=1e-10)
    assert found > len(PROMPTS)


def test_sub_blocks_lie_on_the_grid_of_their_block():
    """A prompt that ends inside a sub-block leaves the rest of it; writing never runs ahead of a sub-block."""
    rollout = decoded()
    for prompt, steps in zip(PROMPTS, rollout.trace.commit_step.tolist(), strict=True):
        numbers = [(len(prompt) + slot) // 2 for slot in range(LENGTH)]
        for slot in range(LENGTH):
            for other in range(LENGTH):
                assert numbers[slot] >= numbers[other] or steps[slot] < steps[other]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"cfg_scale": 1.5}], ids=str)
@pytest.mark.parametrize("kind", ["block_causal", "context_causal"])
@pytest.mark.parametrize("origin", ["position_zero", "response"])
def test_the_prefix_cache_is_exact(origin: str, kind: str, settings: dict[str, Any]):
    hints = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4}, {9: 3}]
    for given in (None, hints):
        plain, cached = (decoded(origin, kind, cache=cache, hints=given, **settings) for cache in ("none", "prefix"))
        assert_same_rows(cached, plain)
        assert cached.exact


def test_one_sub_block_and_one_sure_token_is_sdar_without_a_share():
    """At any temperature: the confidence is that of the tempered and filtered distribution."""
    usual = {"temperature": 0.8, "top_k": 3, "canvas_length": 12, "block_length": 4}
    first = DecodingConfig(
        **usual, schedule="sub_blocks", schedule_args={"sub_block_length": 4, "threshold": 0.5, "first_alone": False}
    )
    second = DecodingConfig(**usual, steps=12, schedule="sdar_dynamic", schedule_args={"threshold": 0.5})
    engine = RolloutEngine(denoiser())
    assert_same_rows(*(engine.generate(OTHER_PROMPTS, config, seed=3) for config in (first, second)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sub_block_length": 0}, "sub_block_length=0"), ({"threshold": -1}, "threshold=-1"), ({"first_alone": 1}, "=1")],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="sub_blocks", schedule_args=arguments)
