"""DAEDAL: searching a length, filling windows, making room."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.schedules.daedal import end_certainty
from tests.rollout.denoisers import EOS, MASK, PROMPTS, assert_same_rows, denoiser
from tests.rollout.table_model import Table, TableModel

VOCAB = 8


def config(canvas_length: int, **more: Any) -> DecodingConfig:
    general = {
        name: more.pop(name) for name in ("stop_at_eos", "temperature", "cfg_scale", "min_new_tokens") if name in more
    }
    return DecodingConfig(canvas_length=canvas_length, schedule="daedal", **general, schedule_args=more)


def decode(table: Table, settings: DecodingConfig, eos: tuple[int, ...] = (EOS,)) -> Rollout:
    model = TableModel(table, VOCAB, mask_token_id=MASK, eos_token_ids=eos)
    return RolloutEngine(model).generate([[5]], settings)


def likely(*slots: tuple[int, float]) -> Tensor:
    """Logits `[1 + n, V]` of a prompt of one token and n slots, each with its most probable token and that's
    probability; the other tokens share the rest."""
    probabilities = torch.stack(
        [torch.full((VOCAB,), (1 - p) / (VOCAB - 1)).index_fill(0, torch.tensor(t), p) for t, p in ((3, 0.9), *slots)]
    )
    return probabilities.double().log()


def states(rollout: Rollout, row: int = 0) -> list[list[int]]:
    """The row's canvas before each of its steps, and the last one, without slots that do not exist."""
    assert rollout.trace.length is not None
    fed = [[t for t in state[row].tolist() if t >= 0] for state in rollout.states()][: int(rollout.trace.steps[row])]
    return [*fed, rollout.canvas[row, : int(rollout.trace.length[row])].tolist()]


# --- by hand ----------------------------------------------------------------------------------------------------------


def searching(tokens: tuple[int, ...]) -> Tensor:
    """Text everywhere; the more slots there are, the more of the last ones are seen behind its end."""
    slots = len(tokens) - 1
    ends = 4 if slots >= 8 else 2 if slots >= 5 else 0
    return likely(*[(3, 0.95)] * (slots - ends), *[(EOS, 0.6)] * ends)


def test_the_length_grows_until_the_end_is_seen():
    """Certainty of the end with 2, 5 and 8 slots: 0, 2 x 0.6 / 4 and 4 x 0.6 / 4."""
    rollout = decode(searching, config(12, start_length=2, growth=3, end_slots=4))
    end = [EOS, EOS]
    assert states(rollout) == [
        [MASK] * 2,
        [MASK] * 5,
        [MASK] * 8,
        [MASK] * 8 + end,
        [3] * 6 + [MASK] * 2 + end,  # of the two slots left, neither is sure enough, and the lower one goes first
        [3] * 6 + [EOS, MASK] + end,
        [3] * 6 + [EOS] * 4,
    ]
    assert rollout.nfe.tolist() == [6] and rollout.stop_reason == ["complete"]
    assert rollout.hinted[0].nonzero().squeeze(-1).tolist() == [8, 9]
    assert rollout.canvas[0].tolist() == [3] * 6 + [EOS] * 6
    assert rollout.trace.start_length.tolist() == [2] and rollout.trace.length.tolist() == [10]


def test_the_length_is_never_more_than_the_largest():
    """A model that sees no end; neither the last slots nor the closing tokens fit."""
    rollout = decode(
        lambda tokens: likely(*[(3, 0.95)] * (len(tokens) - 1)), config(6, start_length=3, growth=2, end_slots=4)
    )
    assert [len(state) for state in states(rollout)] == [3, 5, 6, 6, 6]
    assert rollout.canvas[0].tolist() == [3] * 6 and not bool(rollout.hinted.any())
    assert len(rollout.trace.events.of(EventKind.TRUNCATE)) == 0, "what does not fit is not appended in the first place"


def test_the_canvas_is_not_closed_before_the_shortest_length():
    settings = {"start_length": 2, "growth": 3, "end_slots": 4, "length_end": 0.0}
    assert [len(state) for state in states(decode(searching, config(12, **settings)))[:3]] == [2, 4, 4]
    rollout = decode(searching, config(12, min_new_tokens=6, **settings))
    assert [len(state) for state in states(rollout)[:5]] == [2, 5, 8, 10, 10]
    assert len(rollout.completion_ids[0]) > 6


def test_the_end_may_be_any_token_of_the_set():
    """Both tokens count for the certainty, the first one closes the canvas."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        return likely(*[(3, 0.95)] * (len(tokens) - 3), (6, 0.8), (7, 0.8))

    rollout = decode(table, config(12, start_length=4, growth=4, end_slots=2, length_end=0.75), eos=(7, 6))
    assert states(rollout)[1] == [MASK] * 4 + [7]
    alone = decode(table, config(12, start_length=4, growth=4, end_slots=2, length_end=0.75), eos=(7,))
    assert len(states(alone)[1]) == 8


def test_certainty_looks_at_the_last_slots_that_predict_an_end():
    likeliest = torch.tensor([[1, 3, 1, 1, 3, 1], [3, 3, 1, 3, 3, 1]])
    likelihood = torch.tensor([[0.9, 0.9, 0.5, 0.25, 0.9, 0.75], [0.9, 0.9, 0.5, 0.9, 0.9, 0.75]])
    seen = torch.tensor([[True] * 6, [True] * 5 + [False]])
    step = SimpleNamespace(
        seen=seen, read={"likeliest": likeliest, "likelihood": likelihood}, is_eos=lambda tokens: tokens == 1
    )
    assert end_certainty(step, 3).tolist() == [(0.5 + 0.25 + 0.75) / 3, pytest.approx(0.5 / 3)]


def unsure(last: float) -> Table:
    """Four slots, of which the two in the middle are unsure; when there are more, all are sure."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        slots = len(tokens) - 1
        return likely((3, 0.95), (4, 0.2), (5, 0.25), (6, last)) if slots == 4 else likely(*[(7, 0.95)] * slots)

    return table


ROOM = {"start_length": 4, "window": 4, "growth": 3, "low": 0.3, "length_end": 0.0, "end_slots": 1}


def test_room_is_made_at_the_least_sure_slot():
    """Slots that are pushed behind the window wait for the next one."""
    rollout = decode(unsure(last=0.5), config(8, insert_end=2.0, **ROOM))
    m = MASK
    assert states(rollout) == [[m] * 4, [m] * 4, [3, m, m, m, m, m], [3, 7, 7, 7, m, m], [3, 7, 7, 7, 7, 7]]
    put_in = rollout.trace.events.of(EventKind.INSERT)
    assert put_in.position.tolist() == [1, 1] and put_in.step.tolist() == [1, 1] and put_in.token.tolist() == [m, m]
    assert rollout.trace.commit_step[0].tolist() == [1, 2, 2, 2, 3, 3, -1, -1]


def test_no_room_is_made_where_the_end_is_sure():
    rollout = decode(unsure(last=0.5), config(8, insert_end=0.0, **ROOM))
    assert states(rollout)[-1] == [3, 4, 5, 6] and len(rollout.trace.events.of(EventKind.INSERT)) == 0


def test_no_room_is_made_where_there_is_none():
    rollout = decode(unsure(last=0.5), config(4, insert_end=2.0, **ROOM))
    assert states(rollout)[-1] == [3, 4, 5, 6]


def test_what_is_pushed_over_the_largest_length_is_lost():
    rollout = decode(unsure(last=0.95), config(5, insert_end=2.0, **ROOM))
    m = MASK
    assert states(rollout) == [[m] * 4, [m] * 4, [3, m, m, m, m], [3, 7, 7, 7, m], [3, 7, 7, 7, 7]]
    cut = rollout.trace.events.of(EventKind.TRUNCATE)
    assert cut.position.tolist() == [5] and cut.step.tolist() == [1]
    committed = rollout.trace.events.of(EventKind.COMMIT)
    assert 6 in committed.token.tolist()


def test_a_probability_equal_to_a_bound_does_not_pass_it():
    """Exceeding `high` writes, falling below `low` makes room. The probability is 1, to the last bit."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([0.0] * 3 + [1000.0] + [0.0] * 4).expand(len(tokens), -1)

    settings = {**ROOM, "start_length": 2, "high": 1.0, "insert_end": 2.0}
    rollout = decode(table, config(8, **{**settings, "low": 1.0}))
    assert int(rollout.trace.steps) == 3  # one for the length, one per slot
    assert len(states(rollout)[-1]) == 2
    assert len(states(decode(table, config(8, **{**settings, "low": 1.01})))[-1]) > 2


# --- whatever the model says ------------------------------------------------------------------------------------------

SETTINGS = [
    {"start_length": 4, "window": 4, "growth": 3, "high": 0.6, "low": 0.3, "end_slots": 4}
    | {"length_end": 0.02, "insert_end": 0.1},
    {"start_length": 3, "window": 5, "growth": 8, "high": 0.4, "low": 0.9, "end_slots": 2, "length_end": 0.3},
    {"start_length": 6, "window": 3, "growth": 2, "high": 0.7, "low": 0.5, "end_slots": 8, "length_end": 0.1},
    {"start_length": 1, "window": 32, "growth": 1, "low": 0.5, "end_slots": 3, "temperature": 0.9},
]
LENGTH = 18
every_setting = pytest.mark.parametrize("i", range(len(SETTINGS)))
ROW_IDS = [4, 9, 2, 7, 5]


@functools.cache
def run(i: int, *, row: int | None = None, stop_at_eos: bool = False) -> Rollout:
    """All prompts or one of them, with a model for which many tokens are ends, so that lengths differ."""
    spec = dataclasses.replace(DiffusionSpec.of(denoiser()), eos_token_ids=(EOS, 4, 8, 13, 17, 20))
    rows = range(len(PROMPTS)) if row is None else [row]
    return RolloutEngine(denoiser(), spec).generate(
        [PROMPTS[r] for r in rows],
        config(LENGTH, stop_at_eos=stop_at_eos, **SETTINGS[i]),
        row_ids=[ROW_IDS[r] for r in rows],
        seed=1,
    )


@every_setting
def test_lengths(i: int):
    """While the length is searched it grows by `growth`; then by the room made, once a step at most; never too far."""
    rollout, settings = run(i), SETTINGS[i]
    growth, closing = settings["growth"], settings["end_slots"] // 2
    for row in range(len(rollout)):
        lengths = [len(state) for state in states(rollout, row)]
        search = next(step for step, state in enumerate(states(rollout, row)[1:]) if set(state) != {MASK})
        assert lengths[0] == settings["start_length"]
        for step, (before, after) in enumerate(itertools.pairwise(lengths)):
            gained = [growth] if step < search else [closing] if step == search else [0, growth - 1]
            assert after in [min(before + slots, LENGTH) for slots in gained], (step, search, lengths)


@every_setting
def test_what_is_written_keeps_its_order(i: int):
    """Each step fills open slots, then puts open slots in at one place, then cuts off the end."""
    rollout, settings = run(i), SETTINGS[i]
    grown = 0
    for row in range(len(rollout)):
        for before, after in itertools.pairwise(states(rollout, row)):
            more, fits = max(0, len(after) - len(before)), False
            for at in range(len(before) + 1):
                room = after[at : at + settings["growth"] - 1] if more else []
                kept = after[:at] + after[at + len(room) :]
                same = all(old in (new, MASK) for old, new in zip(before, kept, strict=False))
                fits |= same and (set(room) <= {MASK} or at == len(before))
            assert fits, (before, after)
            grown += more > 0
    assert grown > 0


@pytest.mark.parametrize("i", [0, 3])
def test_a_batch_is_its_rows(i: int):
    for row in range(len(PROMPTS)):
        assert_same_rows(run(i, row=row), run(i), [row])
        assert states(run(i, row=row)) == states(run(i), row)
        assert run(i, row=row).trace.length[0] == run(i).trace.length[row]


def test_rows_end_with_different_lengths():
    assert len(set(run(0).trace.length.tolist())) == len(PROMPTS)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_without_search_and_room_it_is_a_threshold_on_a_canvas_that_ends(cfg_scale: float):
    """One forward finds that the length need not be searched."""
    fixed = DecodingConfig(
        canvas_length=8,
        block_length=4,
        schedule="threshold",
        cfg_scale=cfg_scale,
        stop_at_eos=False,
        schedule_args={"threshold": 0.6},
    )
    engine = RolloutEngine(denoiser())
    expected = engine.generate(PROMPTS, fixed, hints=[{6: EOS, 7: EOS}] * len(PROMPTS))
    arguments = {"start_length": 6, "window": 4, "high": 0.6, "low": 0.0, "length_end": 0.0, "end_slots": 4}
    rollout = engine.generate(PROMPTS, config(20, cfg_scale=cfg_scale, stop_at_eos=False, **arguments))
    assert torch.equal(rollout.canvas[:, :8], expected.canvas)
    assert torch.equal(rollout.nfe, expected.nfe + (2 if cfg_scale else 1))
    steps = expected.trace.commit_step
    assert torch.equal(rollout.trace.commit_step[:, :8], torch.where(steps >= 0, steps + 1, -1))
    torch.testing.assert_close(rollout.trace.raw_log_prob[:, :8], expected.trace.raw_log_prob, rtol=0, atol=1e-10)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_stopping_at_an_end_changes_no_valid_token(i: int):
    """A token's slot can change only while its window is open, and until then no row stops."""
    whole, stopped = run(i), run(i, stop_at_eos=True)
    assert whole.completion_ids == stopped.completion_ids
    assert bool((stopped.nfe <= whole.nfe).all()) and stopped.nfe.sum() < whole.nfe.sum()


def test_the_prompt_is_not_touched():
    engine = RolloutEngine(denoiser())
    fed: list[list[int]] = []
    hook = engine.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        rollout = engine.generate([PROMPTS[2]], config(LENGTH, **SETTINGS[0]))
    finally:
        hook.remove()
    canvases = [row[len(PROMPTS[2]) :] for row in fed]
    assert all(row[: len(PROMPTS[2])] == PROMPTS[2] for row in fed)
    assert canvases == states(rollout)[:-1]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("start_length", 0), ("window", 2.5), ("growth", 0), ("end_slots", -1), ("high", -0.1), ("low", "low")],
)
def test_bad_settings(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
        config(16, **{name: value})


def test_windows_are_not_the_blocks_that_every_schedule_shares():
    with pytest.raises(ValueError, match=r"block_length=4 has no meaning.*window in schedule_args"):
        DecodingConfig(canvas_length=16, schedule="daedal", block_length=4)


def test_what_cannot_go_together():
    with pytest.raises(ValueError, match="cache='prefix' cannot be used with schedule='daedal'"):
        DecodingConfig(canvas_length=16, schedule="daedal", cache="prefix")
    with pytest.raises(ValueError, match="hints is not supported for schedule='daedal'"):
        RolloutEngine(denoiser()).generate([[5]], config(16), hints=[{0: 3}])
    model = TableModel(searching, VOCAB, mask_token_id=MASK)
    with pytest.raises(ValueError, match="needs an end-of-sequence token"):
        RolloutEngine(model).generate([[5]], config(16))
