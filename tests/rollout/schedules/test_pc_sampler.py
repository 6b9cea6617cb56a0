"""PC-Sampler: early and informative first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.pc_sampler import calibrated
from tests.rollout.denoisers import PROMPTS, denoiser
from tests.rollout.schedules.canvases import decode, model_of, order, peaks, same

CONFIDENCES, TOKENS = [0.5, 0.9, 0.6, 0.8], [2, 3, 4, 3]
COUNTS = {2: 4, 3: 90, 4: 6}


def flat(**settings: Any) -> list[int]:
    rollout = decode(model_of(peaks(CONFIDENCES, TOKENS)), 4, "pc_sampler", steps=4, **settings)
    return [slot for [slot] in order(rollout)]


def by_hand(decay: float, alpha: float, information: dict[int, float]) -> list[int]:
    scores = [
        math.exp(-decay * i) * min(alpha, c * information[token])
        for i, (c, token) in enumerate(zip(CONFIDENCES, TOKENS, strict=True))
    ]
    return sorted(range(4), key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("alpha", [0.05, 1.0, 10.0])
def test_the_order_by_hand(decay: float, alpha: float):
    information = {token: -math.log(count / 100) for token, count in COUNTS.items()}
    assert flat(frequencies=COUNTS, decay=decay, alpha=alpha) == by_hand(decay, alpha, information)


def test_common_tokens_wait():
    assert flat(decay=0.0) == [1, 3, 2, 0]
    assert flat(decay=0.0, frequencies=COUNTS) == [2, 0, 1, 3]
    # One that was never seen counts as seen once, whether the table has its id, ends before it or says so.
    assert flat(decay=0.0, frequencies={2: 90, 4: 10}) == [1, 3, 2, 0]
    assert flat(decay=0.0, frequencies={2: 100}) == [1, 3, 2, 0]
    once = {2: math.log(99), 3: math.log(99 / 98), 4: math.log(99)}
    assert flat(decay=0.0, frequencies={2: 0, 3: 98, 4: 1}) == by_hand(0.0, 10.0, once) == [2, 0, 1, 3]


def test_without_place_and_information_it_is_low_confidence():
    ours = decode(denoiser(), 12, "pc_sampler", PROMPTS, steps=6, block_length=6, decay=0.0)
    assert same(ours, decode(denoiser(), 12, "low_confidence", PROMPTS, steps=6, block_length=6))


def test_where_only_the_place_counts_it_is_left_to_right():
    ours = decode(denoiser(), 12, "pc_sampler", PROMPTS, steps=6, block_length=6, decay=50.0)
    assert same(ours, decode(denoiser(), 12, "left_to_right", PROMPTS, steps=6, block_length=6))


def test_a_place_is_one_in_its_block():
    model = model_of(peaks([0.6, 0.9, 0.6, 0.9]))
    assert order(decode(model, 4, "pc_sampler", steps=4, block_length=2, decay=0.1)) == [[1], [0], [3], [2]]
    assert order(decode(model, 4, "pc_sampler", steps=4, block_length=2, decay=1.0)) == [[0], [1], [2], [3]]


def test_late_blocks_are_told_apart_too():
    """Places on the canvas would underflow in float32, and then the first of a block would win always."""
    step = SimpleNamespace(
        offsets=torch.arange(2000),
        start=torch.tensor([1998]),
        drawn=SimpleNamespace(confidence=torch.tensor([[0.1] * 1999 + [0.9]]), token=torch.zeros(1, 2000).long()),
    )
    scores = calibrated(torch.ones(1), 0.25, 10.0)(step)
    assert float(scores[0, 1999]) > float(scores[0, 1998]) > 0


@pytest.mark.parametrize(
    "content", [{"2": 4, "3": 90, "4": 6}, {"num_token": 100, "p_baseline_dict": {"2": 4, "3": 90, "4": 6}}]
)
def test_counts_from_a_file(content: dict[str, Any], tmp_path: Path):
    file = tmp_path / "counts.json"
    file.write_text(json.dumps(content))
    assert flat(frequencies=str(file), decay=0.25) == flat(frequencies=COUNTS, decay=0.25)


def test_a_total_of_its_own(tmp_path: Path):
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"num_token": 10_000, "p_baseline_dict": {"2": 4, "3": 90, "4": 6}}))
    information = {token: -math.log(count / 10_000) for token, count in COUNTS.items()}
    assert flat(frequencies=str(file), decay=0.0, alpha=4.0) == by_hand(0.0, 4.0, information)


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ("nowhere.json", "there is no such file"),
        ({}, "it must be a mapping"),
        ({"the": 3}, "'the' is no token id"),
        ({-1: 3}, "-1 is no token id"),
        ({True: 3}, "True is no token id"),
        ({3: -1}, "-1 is no count"),
        ({3: math.nan}, "nan is no count"),
        ({3: "many"}, "'many' is no count"),
        ({"num_token": 3, "p_baseline_dict": {3: 4}}, "a total of 3.0 is less"),
        ({"p_baseline_dict": [1, 2]}, "it must be a mapping"),
        ({3: 0}, "a total of 0 is less|a total of 0.0 is less"),
        (7, "it must be a mapping"),
    ],
)
def test_frequencies_that_make_no_sense(frequencies: object, message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="pc_sampler", schedule_args={"frequencies": frequencies})


def test_a_file_that_holds_something_else(tmp_path: Path):
    file = tmp_path / "counts.json"
    file.write_text("3: 4")
    with pytest.raises(ValueError, match="is not a JSON file"):
        DecodingConfig(schedule="pc_sampler", schedule_args={"frequencies": str(file)})


@pytest.mark.parametrize(("name", "value"), [("decay", -1), ("decay", math.inf), ("alpha", math.nan)])
def test_settings_that_make_no_sense(name: str, value: object):
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        DecodingConfig(schedule="pc_sampler", schedule_args={name: value})
