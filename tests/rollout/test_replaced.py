"""Rows of one rollout in the place of another's: what is recorded moves along with them."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.rollout.denoisers import PROMPTS, denoiser

SETTINGS = {
    "once": {"steps": 6, "temperature": 1.0},
    "greedy": {"steps": 6},
    "remasking": {"schedule": "wino", "temperature": 1.0},
    "drawn order": {"schedule": "dream_origin", "steps": 6, "temperature": 1.0},
}


def two(name: str) -> tuple[Rollout, Rollout]:
    """A rollout, and some of its rows once more, with hints."""
    decoding = DecodingConfig(canvas_length=12, stop_at_eos=False, **SETTINGS[name])
    engine = RolloutEngine(denoiser())
    first = engine.generate(PROMPTS, decoding, seed=1)
    hints = [{0: 5, 7: 6}, {}, {3: 9}]
    second = engine.generate([PROMPTS[i] for i in (1, 3, 4)], decoding, seed=1, row_ids=[90, 91, 92], hints=hints)
    return first, second


@pytest.mark.parametrize("name", SETTINGS)
def test_every_row_is_replayed_as_it_was(name: str) -> None:
    first, second = two(name)
    places = {3: 1, 1: 2}
    joined = first.replaced(places, second)
    assert (joined.trace.events is not None) == (name == "remasking")
    source = [(second, places[i]) if i in places else (first, i) for i in range(len(first))]
    before = {id(rollout): list(rollout.states()) for rollout in (first, second)}
    states = list(joined.states())
    for row, (rollout, place) in enumerate(source):
        for field in ("canvas", "valid", "hinted", "nfe", "extra_forwards"):
            assert torch.equal(getattr(joined, field)[row], getattr(rollout, field)[place]), field
        for field in ("prompt_ids", "stop_reason", "row_ids"):
            assert getattr(joined, field)[row] == getattr(rollout, field)[place]
        for field in ("commit_step", "raw_log_prob", "steps"):
            assert torch.equal(getattr(joined.trace, field)[row], getattr(rollout.trace, field)[place]), field
        count = int(rollout.trace.steps[place])
        for step in range(count):
            assert torch.equal(states[step][row], before[id(rollout)][step][place])
        mine, theirs = joined.trace.selection_log_prob, rollout.trace.selection_log_prob
        if theirs is not None:
            assert torch.equal(mine[row, :count], theirs[place, :count])
    assert joined.replaced({}, second) is joined


def test_an_attempt_may_take_no_place_or_several() -> None:
    first, second = two("remasking")
    joined = first.replaced({0: 0, 2: 0}, second)
    assert torch.equal(joined.canvas[0], joined.canvas[2]) and torch.equal(joined.canvas[0], second.canvas[0])
    for state in joined.states():
        assert torch.equal(state[0], state[2])


def test_rows_that_were_decoded_differently_are_refused() -> None:
    first, _ = two("once")
    _, other = two("greedy")
    other.seed = 2
    with pytest.raises(ValueError, match="seed"):
        first.replaced({0: 0}, other)
    other.seed, other.canvas = 1, other.canvas[:, :8]
    with pytest.raises(ValueError, match="canvas"):
        first.replaced({0: 0}, other)
