"""AdaBlock: blocks that end with a delimiter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.rows import Progress
from tests.rollout.denoisers import EOS, MASK, PROMPTS, assert_same_rows, denoiser, row_logits
from tests.rollout.table_model import TableModel

VOCAB = 8


def config(canvas_length: int, **more: Any) -> DecodingConfig:
    general = {name: more.pop(name) for name in ("temperature", "cache") if name in more}
    return DecodingConfig(
        canvas_length=canvas_length, schedule="adablock", stop_at_eos=False, **general, schedule_args=more
    )


def decode(
    model: Any, settings: DecodingConfig, prompts: list[list[int]], **more: Any
) -> tuple[Rollout, list[list[tuple[int, int]]]]:
    """The rollout, and each row's blocks `(start, stop)`."""
    steps: list[Progress] = []
    rollout = RolloutEngine(model).generate(prompts, settings, on_step=steps.append, **more)
    blocks: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for step in steps:
        for slot, start, stop in zip(step.slots.tolist(), step.start.tolist(), step.stop.tolist(), strict=True):
            if (start, stop) not in blocks[slot]:
                blocks[slot].append((start, stop))
    return rollout, blocks


# --- by hand ----------------------------------------------------------------------------------------------------------


def said(delimiters: dict[int, float]) -> TableModel:
    """A model that is sure of token 3 (0.95), but for delimiters (token 4) at some slots, with these probabilities."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        probabilities = torch.full((len(tokens), VOCAB), 0.05 / (VOCAB - 1), dtype=torch.float64)
        probabilities[:, 3] = 0.95
        for slot, p in delimiters.items():
            if 1 + slot < len(tokens):
                probabilities[1 + slot] = (1 - p) / (VOCAB - 1)
                probabilities[1 + slot, 4] = p
        return probabilities.log()

    return TableModel(table, VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))


def blocks_of(delimiters: dict[int, float], hints: dict[int, int] | None = None, **more: Any) -> list[tuple[int, int]]:
    """On a canvas of 16 slots, of which 4 are looked at."""
    settings = config(16, **{"delimiter_ids": (4,), "delimiter_threshold": 0.3, "default_block": 6, **more})
    return decode(said(delimiters), settings, [[5]], hints=[hints or {}])[1][0]


def test_a_delimiter_ends_the_block():
    assert blocks_of({2: 0.5}) == [(0, 3), (3, 9), (9, 15), (15, 16)]


def test_without_a_delimiter_blocks_have_the_default_length():
    assert blocks_of({}) == [(0, 6), (6, 12), (12, 16)]
    assert blocks_of({2: 0.5}, delimiter_ids=(6, 7)) == [(0, 6), (6, 12), (12, 16)]
    assert blocks_of({2: 0.5}, delimiter_ids=()) == [(0, 6), (6, 12), (12, 16)]


def test_the_surest_delimiter_counts_and_not_the_nearest():
    assert blocks_of({0: 0.5, 2: 0.7, 3: 0.6})[0] == (0, 3)
    assert blocks_of({1: 0.6, 2: 0.6})[0] == (0, 2), "among equals the lower position"


def test_a_delimiter_must_be_sure_enough():
    assert blocks_of({2: 0.29})[0] == (0, 6)
    assert blocks_of({2: 0.5}, delimiter_threshold=0.51)[0] == (0, 6)
    assert blocks_of({2: 1.0}, delimiter_threshold=1.0)[0] == (0, 3), "reaching the threshold is enough"
    assert blocks_of({2: 1.0}, delimiter_threshold=float("inf"))[0] == (0, 6)


def test_a_quarter_of_the_canvas_is_looked_at():
    assert blocks_of({4: 0.9}) == [(0, 6), (6, 12), (12, 16)]
    assert blocks_of({7: 0.9}) == [(0, 6), (6, 8), (8, 14), (14, 16)]
    assert blocks_of({3: 0.9}, default_block=2) == [(0, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 14), (14, 16)]


def test_a_canvas_of_three_slots_has_nothing_to_look_at():
    settings = config(3, delimiter_ids=(3, 4), delimiter_threshold=0.0, default_block=2)
    assert decode(said({}), settings, [[5]])[1] == [[(0, 2), (2, 3)]]


def test_the_first_forward_also_writes():
    """A block whose candidates are all sure costs the forward that its length was taken from, and no other."""
    settings = config(16, delimiter_ids=(4,), delimiter_threshold=0.3, default_block=6, threshold=0.9)
    rollout, [blocks] = decode(said({2: 0.92, 12: 0.5}), settings, [[5]])
    assert blocks == [(0, 3), (3, 9), (9, 13), (13, 16)]
    # The delimiter at 12 ends its block without being sure enough to be written with the rest.
    assert rollout.trace.commit_step[0].tolist() == [0] * 3 + [1] * 6 + [2] * 3 + [3] + [4] * 3
    assert rollout.nfe.tolist() == [5]


def test_blocks_are_counted_from_their_first_open_slot():
    """Slots that were given end no block, and none is spent on them."""
    assert blocks_of({}, hints={0: 4, 1: 3, 2: 4}) == [(0, 9), (9, 15), (15, 16)]
    assert blocks_of({4: 0.9}, hints={0: 3, 1: 3, 3: 4}) == [(0, 5), (5, 11), (11, 16)]
    rollout, _ = decode(said({}), config(8, default_block=2, threshold=0.0), [[5]], hints=[dict.fromkeys(range(4), 3)])
    assert rollout.nfe.tolist() == [2]


# --- whatever the model says ------------------------------------------------------------------------------------------

SETTINGS = [
    {"delimiter_ids": tuple(range(3, 24, 3)), "delimiter_threshold": 0.2, "default_block": 5, "threshold": 0.5},
    {"delimiter_ids": tuple(range(3, 24)), "delimiter_threshold": 0.3, "default_block": 2, "threshold": 0.7},
    {"delimiter_ids": tuple(range(2, 24, 2)), "delimiter_threshold": 0.0, "default_block": 9, "temperature": 0.8},
]
LENGTH = 18
every_setting = pytest.mark.parametrize("i", range(len(SETTINGS)))


@functools.cache
def run(i: int) -> tuple[Rollout, list[list[tuple[int, int]]]]:
    return decode(denoiser(), config(LENGTH, **SETTINGS[i]), PROMPTS, row_ids=[3, 1, 4, 5, 9], seed=2)


@every_setting
def test_blocks_follow_each_other(i: int):
    """Their lengths sum to the canvas; none is longer than the default and a quarter of the canvas allow."""
    rollout, blocks = run(i)
    for row, spans in enumerate(blocks):
        assert [start for start, _ in spans] == [0] + [stop for _, stop in spans[:-1]] and spans[-1][1] == LENGTH
        assert all(1 <= stop - start <= max(SETTINGS[i]["default_block"], LENGTH // 4) for start, stop in spans)
        assert rollout.nfe[row] >= len(spans)


@every_setting
def test_blocks_end_with_a_delimiter_or_have_the_default_length(i: int):
    """Seen from the model's own forward on the canvas with which a block began, at temperature 0."""
    settings = {**SETTINGS[i], "temperature": 0.0}
    rollout, blocks = decode(denoiser(), config(LENGTH, **settings), PROMPTS)
    kinds: set[str] = set()
    for row, spans in enumerate(blocks):
        for start, stop in spans:
            first = int(rollout.trace.commit_step[row, start:stop].min())
            state = torch.where(rollout.trace.commit_step[row] < first, rollout.canvas[row], MASK)
            probabilities = row_logits(denoiser(), PROMPTS[row], state).softmax(-1)
            probabilities[:, MASK] = 0.0  # no candidate
            window = range(start, min(start + LENGTH // 4, LENGTH))
            best = {slot: int(probabilities[slot].argmax()) for slot in window}
            found = {slot: float(probabilities[slot, t]) for slot, t in best.items() if t in settings["delimiter_ids"]}
            surest = max(found, key=lambda slot: found[slot], default=None)
            if surest is not None and found[surest] >= settings["delimiter_threshold"]:
                kinds.add("delimiter")
                assert stop == surest + 1
            else:
                kinds.add("default")
                assert stop == min(start + settings["default_block"], LENGTH)
    assert kinds == {"delimiter", "default"}


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("arguments", [{"delimiter_ids": (3, 4), "delimiter_threshold": float("inf")}, {}])
def test_without_delimiters_it_is_the_threshold(cache: str, temperature: float, arguments: dict[str, Any]):
    engine = RolloutEngine(denoiser())
    shared = {"canvas_length": 12, "temperature": temperature, "cache": cache}
    fixed = DecodingConfig(schedule="threshold", block_length=4, schedule_args={"threshold": 0.5}, **shared)
    ours = DecodingConfig(
        schedule="adablock", schedule_args={"default_block": 4, "threshold": 0.5, **arguments}, **shared
    )
    assert_same_rows(engine.generate(PROMPTS, ours, seed=4), engine.generate(PROMPTS, fixed, seed=4))


def test_one_token_at_a_time_it_is_low_confidence():
    engine = RolloutEngine(denoiser())
    even = DecodingConfig(canvas_length=12, schedule="low_confidence", block_length=4, steps=12)
    ours = DecodingConfig(
        canvas_length=12, schedule="adablock", schedule_args={"default_block": 4, "threshold": float("inf")}
    )
    assert_same_rows(engine.generate(PROMPTS, ours), engine.generate(PROMPTS, even))


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_a_batch_is_its_rows(cache: str):
    """Rows whose blocks differ, which they do here."""
    rows, blocks = decode(denoiser(), config(LENGTH, **SETTINGS[0], cache=cache), PROMPTS)
    assert len({tuple(spans) for spans in blocks}) > 2
    for row, prompt in enumerate(PROMPTS):
        alone, own = decode(denoiser(), config(LENGTH, **SETTINGS[0], cache=cache), [prompt], row_ids=[row])
        assert_same_rows(alone, rows, [row])
        assert own == [blocks[row]]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("delimiter_ids", 198), ("delimiter_ids", ("\n",)), ("default_block", 0), ("delimiter_threshold", float("nan"))],
)
def test_bad_settings(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        config(16, **{name: value})


def test_the_default_is_not_the_block_length_that_every_schedule_shares():
    with pytest.raises(ValueError, match=r"block_length=4 has no meaning.*default_block in schedule_args"):
        DecodingConfig(canvas_length=16, schedule="adablock", block_length=4)


def test_delimiters_may_come_from_a_file():
    """A list, as YAML and JSON have it."""
    assert config(16, delimiter_ids=[198, 11]).arguments().delimiter_ids == (198, 11)
