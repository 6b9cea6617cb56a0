"""Fast-dLLM's schedules: everything confident enough at once."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.threshold import confident_together
from tests.rollout.denoisers import PROMPTS, denoiser, row_logits
from tests.rollout.schedules.canvases import counts, decode, model_of, order, peaks, row, same

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=10)


def chosen(scores: list[float], factor: float) -> list[int]:
    """Slots that the factor rule writes among slots that are all open."""
    step = SimpleNamespace(eligible=torch.ones(1, len(scores), dtype=torch.bool))
    return confident_together(factor)(step, row(scores))[0].nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize(
    ("confidences", "factor", "written"),
    [
        ([0.99, 0.99, 0.1], 1.0, [[0, 1], [2]]),  # 0.99 >= 1 - 1/3, and 0.1 fails as the last rank too
        ([0.99, 0.1], 1.0, [[0], [1]]),
        ([0.1, 0.2], 1.0, [[1], [0]]),
        ([0.3, 0.7, 0.6, 0.8], 1.0, [[1, 3], [2], [0]]),  # rank 3 would need 0.75
        ([0.3, 0.7, 0.6, 0.8], 1.6, [[1, 2, 3], [0]]),  # 0.6 is what rank 3 needs
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 0.5, [[0, 1, 2, 3], [4, 5, 6]]),  # rank 5 needs 1 - 0.5 / 6
    ],
)
def test_as_many_go_together_as_are_confident_enough_for_their_number(
    confidences: list[float], factor: float, written: list[list[int]]
):
    rollout = decode(model_of(peaks(confidences)), len(confidences), "factor", factor=factor + 1e-12)
    assert order(rollout) == written


@given(scores=probabilities, factor=st.floats(0, 12))
def test_the_ranks_before_the_first_that_fails(scores: list[float], factor: float):
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    expected = ranked[:1]
    for n, i in enumerate(ranked[1:], start=2):
        if scores[i] < 1 - factor / (n + 1):
            break
        expected.append(i)
    assert chosen(scores, factor) == sorted(expected)
    theorem = max((n for n, i in enumerate(ranked, 1) if scores[i] >= 1 - factor / (n + 1)), default=1)
    assert len(expected) <= theorem


@given(scores=probabilities)
def test_the_ends_of_the_factor(scores: list[float]):
    certain = sum(score == 1 for score in scores)
    assert len(chosen(scores, 0.0)) == max(1, certain)
    assert len(chosen(scores, len(scores) + 1.0)) == len(scores)


def test_candidates_that_wait_go_last():
    model = model_of(peaks([0.9, 0.99, 0.8], tokens=[3, 4, 3]))
    assert order(decode(model, 3, "factor", factor=9.0, defer_token_ids=(4,))) == [[0, 2], [1]]


@pytest.mark.parametrize("block_length", [None, 4])
def test_one_at_a_time_without_confidence(block_length: int | None):
    greedy = decode(denoiser(), 12, "low_confidence", PROMPTS, steps=12, block_length=block_length)
    assert same(decode(denoiser(), 12, "threshold", PROMPTS, threshold=math.inf, block_length=block_length), greedy)
    assert same(decode(denoiser(), 12, "factor", PROMPTS, factor=0.0, block_length=block_length), greedy)


@pytest.mark.parametrize(
    "settings", [{"schedule": "threshold", "threshold": 0.0}, {"schedule": "factor", "factor": 5.0}]
)
def test_a_block_at_once_without_a_bar(settings: dict):
    rollout = decode(denoiser(), 12, prompts=PROMPTS, block_length=4, **settings)
    assert rollout.nfe.tolist() == [3] * len(PROMPTS)
    assert counts(rollout) == [4, 4, 4]


def test_what_reaches_the_threshold_and_the_best():
    rollout = decode(denoiser(), 10, "threshold", PROMPTS, threshold=0.5)
    several = 0
    for i, prompt in enumerate(PROMPTS):
        for state, written in zip(rollout.states(), order(rollout, i), strict=False):
            confidence = row_logits(denoiser(), prompt, state[i]).softmax(-1).amax(-1)
            confidence[state[i] != rollout.mask_token_id] = -1
            reached = set((confidence >= 0.5).nonzero().squeeze(-1).tolist())
            assert set(written) == reached | {int(confidence.argmax())}
            several += len(written) > 1
    assert several > 3


@pytest.mark.parametrize("value", [-0.1, math.nan, "high", None, True])
def test_settings_that_make_no_sense(value: object):
    with pytest.raises(ValueError, match="factor=.* is not allowed"):
        DecodingConfig(schedule="factor", schedule_args={"factor": value})
