"""LLaDA's schedules: an even number of tokens per step in some order."""

from __future__ import annotations

import itertools

import pytest

from tests.rollout.denoisers import PROMPTS, denoiser
from tests.rollout.schedules.canvases import counts, decode, model_of, order, peaks, same


def test_reading_order():
    rollout = decode(model_of(peaks([0.3, 0.9, 0.5, 0.99, 0.4])), 5, "left_to_right", steps=3)
    assert order(rollout) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_one_token_at_a_time_is_what_blocks_of_one_are(temperature: float):
    alone = decode(denoiser(), 6, "left_to_right", PROMPTS, steps=6, temperature=temperature)
    blocks = decode(denoiser(), 6, "low_confidence", PROMPTS, steps=6, block_length=1, temperature=temperature)
    assert same(alone, blocks)


def test_blocks_are_filled_in_turn():
    rollout = decode(denoiser(), 12, "left_to_right", PROMPTS, steps=6, block_length=6)
    for i in range(len(PROMPTS)):
        assert list(itertools.chain(*order(rollout, i))) == list(range(12))
        assert counts(rollout, i) == [2] * 6
