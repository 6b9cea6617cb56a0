"""The parts that schedules are made of, and the registry of names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from rl4dlm.rollout.decoding import DecodingConfig, available_schedules, schedule_arguments
from rl4dlm.rollout.schedules import registry
from rl4dlm.rollout.schedules.llada import LLaDAArguments
from rl4dlm.rollout.schedules.parts import above, even_counts, top
from rl4dlm.rollout.schedules.threshold import ThresholdArguments


@given(masked=st.integers(0, 300), steps=st.integers(1, 300))
def test_even_counts_share_out_everything_evenly(masked: int, steps: int):
    counts = [int(even_counts(torch.tensor(masked), steps, torch.tensor(step))) for step in range(steps)]
    assert sum(counts) == masked
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


rows = st.lists(
    st.tuples(st.sampled_from([float("-inf"), 0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=12
)


@given(row=rows, count=st.integers(0, 14))
def test_top_is_a_sort_by_score_then_position(row: list[tuple[float, bool]], count: int):
    scores, eligible = torch.tensor([[s for s, _ in row]]), torch.tensor([[e for _, e in row]])
    chosen = top(scores, eligible, torch.tensor([count]))[0].nonzero().squeeze(-1).tolist()
    ranked = sorted((-score, i) for i, (score, is_eligible) in enumerate(row) if is_eligible)
    assert chosen == sorted(i for _, i in ranked[:count])


def test_top_looks_at_each_row_alone():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    eligible = torch.tensor([[True, True, True], [False, True, True]])
    assert top(scores, eligible, torch.tensor([1, 2])).tolist() == [[False, True, False], [False, True, True]]
    assert top(scores[1:], eligible[1:], torch.tensor([2])).tolist() == [[False, True, True]]


def test_a_threshold_is_reached_by_what_equals_it():
    rule = above(0.5)
    assert rule(SimpleNamespace(), torch.tensor([[0.49, 0.5, 0.51]])).tolist() == [[False, True, True]]


def test_the_schedules_there_are():
    assert {"low_confidence", "random", "threshold"} <= set(available_schedules())
    assert available_schedules() == sorted(available_schedules())
    assert schedule_arguments("threshold") is ThresholdArguments
    assert schedule_arguments("random") is LLaDAArguments


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'random' is registered already"):
        registry.register("random", LLaDAArguments)(lambda arguments, config: None)


@pytest.mark.parametrize(
    ("length", "block", "steps", "blocks", "per_block"),
    [(256, 32, 128, 8, 16), (12, None, None, 1, 6), (12, 4, None, 3, 2), (10, 5, None, 2, 3), (7, 7, 14, 1, 14)],
)
def test_steps_are_shared_out_over_blocks(
    length: int, block: int | None, steps: int | None, blocks: int, per_block: int
):
    config = DecodingConfig(canvas_length=length, block_length=block, steps=steps)
    assert (config.num_blocks, config.steps_per_block) == (blocks, per_block)
