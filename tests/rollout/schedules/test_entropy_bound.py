"""Entropy-bounded unmasking: a prefix of the entropy order."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.entropy_bound import bounded
from tests.rollout.denoisers import PROMPTS, denoiser
from tests.rollout.schedules.canvases import counts, decode, entropy, model_of, order, peaks, row, same

CONFIDENCES = [0.3, 0.97, 0.5, 0.9, 0.96, 0.99]


@given(
    slots=st.lists(st.tuples(st.sampled_from([0.0, 0.125, 0.25, 0.5, 2.0]), st.booleans()), min_size=1, max_size=10),
    gamma=st.sampled_from([0.0, 0.2, 0.5, 1.0, math.inf]),
)
def test_the_longest_prefix_whose_sum_without_the_largest_is_within_the_bound(
    slots: list[tuple[float, bool]], gamma: float
):
    step = SimpleNamespace(eligible=torch.tensor([[is_open for _, is_open in slots]]))
    chosen = bounded(gamma)(step, row([-value for value, _ in slots]))[0].nonzero().squeeze(-1).tolist()
    ranked = sorted((value, i) for i, (value, is_open) in enumerate(slots) if is_open)
    fitting = [n for n in range(1, len(ranked) + 1) if sum(v for v, _ in ranked[:n]) - ranked[n - 1][0] <= gamma]
    assert chosen == sorted(i for _, i in ranked[: max(fitting, default=0)])


def test_a_canvas_by_hand():
    entropies = [entropy(distribution) for distribution in peaks(CONFIDENCES)]
    lowest = sorted(range(6), key=lambda i: entropies[i])
    assert lowest == [5, 1, 4, 3, 2, 0]
    gamma = entropies[5] + entropies[1] + 1e-9  # of three that go together the largest does not count
    rollout = decode(model_of(peaks(CONFIDENCES)), 6, "entropy_bound", gamma=gamma)
    assert order(rollout)[0] == [1, 4, 5]
    assert entropies[3] > gamma and order(rollout)[1:] == [[3], [2], [0]]


def test_without_a_bound_one_at_a_time_and_what_is_certain_with_it():
    certain = [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]] * 2
    rollout = decode(model_of([*peaks(CONFIDENCES[:2]), *certain]), 4, "entropy_bound", gamma=0.0)
    # The sum before the first uncertain one is 0 as well.
    assert order(rollout) == [[1, 2, 3], [0]]
    distinct = decode(model_of(peaks(CONFIDENCES)), 6, "entropy_bound", gamma=0.0)
    assert same(distinct, decode(model_of(peaks(CONFIDENCES)), 6, "low_confidence", steps=6))


def test_everything_at_once():
    rollout = decode(denoiser(), 8, "entropy_bound", PROMPTS, gamma=math.inf, block_length=4)
    assert [counts(rollout, i) for i in range(len(PROMPTS))] == [[4, 4]] * len(PROMPTS)


def test_candidates_that_wait_go_last():
    model = model_of(peaks([0.9, 0.99, 0.8], tokens=[3, 4, 3]))
    assert order(decode(model, 3, "entropy_bound", gamma=9.0, defer_token_ids=(4,))) == [[0, 2], [1]]


@pytest.mark.parametrize("value", [-1, math.nan, "0.1"])
def test_settings_that_make_no_sense(value: object):
    with pytest.raises(ValueError, match="gamma=.* is not allowed"):
        DecodingConfig(schedule="entropy_bound", schedule_args={"gamma": value})
