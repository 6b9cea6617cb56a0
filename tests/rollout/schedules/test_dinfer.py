"""dInfer's decoders: hierarchical, credit, smoothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.schedules.dinfer import best_of_runs
from tests.rollout.denoisers import MASK, PROMPTS, VOCAB, assert_same_rows, denoiser, row_logits, sampling_distribution
from tests.rollout.schedules import hand_tables
from tests.rollout.schedules.one_row import Row, assert_decodes, decode

LENGTH, BLOCK = 12, 6


def generate(schedule: str, temperature: float = 0.0, **arguments: Any) -> Rollout:
    config = DecodingConfig(
        canvas_length=LENGTH,
        block_length=BLOCK,
        schedule=schedule,
        temperature=temperature,
        stop_at_eos=False,
        schedule_args=arguments,
    )
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


def look_at(prompt: list[int]) -> Any:
    return lambda row: row_logits(denoiser(), prompt, torch.tensor(row.canvas))


# --- hierarchical -----------------------------------------------------------------------------------------------------


def runs_of(slots: list[int]) -> list[list[int]]:
    """Neighbouring slots."""
    groups = itertools.groupby(enumerate(slots), lambda pair: pair[1] - pair[0])
    return [[slot for _, slot in group] for _, group in groups]


@given(row=st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, -torch.inf]), st.booleans()), min_size=1, max_size=12))
def test_the_best_of_each_run(row: list[tuple[float, bool]]):
    scores, slots = torch.tensor([[s for s, _ in row]]), torch.tensor([[o for _, o in row]])
    expected = [min(run, key=lambda i: (-row[i][0], i)) for run in runs_of([i for i, (_, o) in enumerate(row) if o])]
    assert best_of_runs(scores, slots)[0].nonzero().squeeze(-1).tolist() == expected


def test_runs_of_rows_are_apart():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    slots = torch.tensor([[True, True, True], [True, False, True]])
    assert best_of_runs(scores, slots).tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize(("high", "low"), [(0.6, 0.3), (0.9, 0.0), (float("inf"), 0.2)])
def test_hierarchical_follows_its_definition(high: float, low: float):
    several = 0

    def rule(row: Row, logits: Tensor) -> set[int]:
        nonlocal several
        chosen = {i for run in runs_of(row.open) for i in [row.best(run)] if row.p[i] > low}
        chosen |= {i for i in row.open if row.p[i] > high}
        several += len(chosen) > 1
        return chosen or {row.best(row.open)}

    rollout = generate("hierarchical", threshold=high, low_threshold=low)
    for index, prompt in enumerate(PROMPTS):
        assert_decodes(rollout, index, decode(LENGTH, BLOCK, look_at(prompt), rule))
    assert several


def test_hierarchical_divides():
    """A peak in the middle is written first and splits the run in two, each of which gives its lowest slot."""
    good = (hand_tables.A, 0.6)
    wishes = hand_tables.always(good, good, good, (hand_tables.B, 0.7), good, good, good)
    rollout = hand_tables.decode(wishes, 7, "hierarchical", {"threshold": 0.9, "low_threshold": 0.5})
    assert rollout.trace.commit_step.tolist() == [[1, 2, 3, 0, 1, 2, 3]]
    rollout = hand_tables.decode(wishes, 7, "hierarchical", {"threshold": 0.9, "low_threshold": 0.6})
    assert rollout.trace.commit_step.tolist() == [[1, 2, 3, 0, 4, 5, 6]]  # no run's best exceeds 0.6 any more


def test_given_slots_split_runs():
    wishes = hand_tables.always(*[(hand_tables.A, 0.6)] * 5)
    hints = [{2: hand_tables.C}]
    rollout = hand_tables.decode(wishes, 5, "hierarchical", {"threshold": 0.9, "low_threshold": 0.5}, hints=hints)
    assert rollout.trace.commit_step.tolist() == [[0, 1, -1, 0, 1]]


def test_a_hierarchy_without_thresholds_writes_one_token_per_step():
    slow = DecodingConfig(canvas_length=LENGTH, block_length=BLOCK, steps=LENGTH, stop_at_eos=False)
    plain = RolloutEngine(denoiser()).generate(PROMPTS, slow, seed=3)
    never = float("inf")
    assert_same_rows(generate("hierarchical", threshold=never, low_threshold=never), plain)


@pytest.mark.parametrize(("high", "low", "doubt"), [(0.6, 0.3, 0.5), (0.5, 0.0, 0.9), (0.3, 0.2, 1.0)])
def test_taking_back_follows_its_definition(high: float, low: float, doubt: float):
    changes = 0

    def rule(row: Row, logits: Tensor) -> set[int]:
        nonlocal changes
        held = logits.softmax(-1).gather(-1, torch.tensor(row.canvas)[:, None]).squeeze(-1).tolist()
        doubted = [i for i in row.block if row.canvas[i] != MASK and held[i] < doubt]
        slots = sorted([*row.open, *doubted])
        chosen = {i for run in runs_of(slots) for i in [row.best(run)] if row.p[i] > low}
        chosen |= {i for i in slots if row.p[i] > high}
        while len(chosen) < len(doubted) + 1:
            chosen.add(row.best([i for i in slots if i not in chosen]))
        before = len(row.open)
        for i in set(doubted) - chosen:
            row.canvas[i] = MASK
            changes += 1
        kept = {i for i in chosen if row.canvas[i] == row.token[i]}
        assert len(row.open) - len(chosen - set(doubted)) < before  # fewer slots are open after every step
        return chosen - kept

    rollout = generate("hierarchical", threshold=high, low_threshold=low, remask_threshold=doubt)
    for index, prompt in enumerate(PROMPTS):
        assert_decodes(rollout, index, decode(LENGTH, BLOCK, look_at(prompt), rule))
    events = rollout.trace.events
    assert events is not None
    assert len(events.of(EventKind.REMASK)) == changes
    assert changes


A, B, C, D = hand_tables.A, hand_tables.B, hand_tables.C, hand_tables.D
TAKE_BACK = {"threshold": 0.8, "low_threshold": 0.8, "remask_threshold": 0.4}


def test_what_the_model_now_prefers_takes_the_place_of_a_doubted_token():
    def wishes(canvas: tuple[int, ...]) -> list[hand_tables.Wish]:
        return [(A, 0.9) if canvas[1] == MASK else (D, 0.85), (B, 0.95), (C, 0.6)]

    rollout = hand_tables.decode(wishes, 3, "hierarchical", TAKE_BACK)
    assert hand_tables.states(rollout) == [[MASK] * 3, [A, B, MASK], [D, B, C]]
    assert hand_tables.happened(rollout, EventKind.REPLACE) == [(1, 0, D)]
    assert hand_tables.happened(rollout, EventKind.REMASK) == []


def test_a_doubted_token_without_a_better_one_is_opened_again():
    """Slot 0 holds A, which has become improbable; that its best token is above the limit does not save it."""

    def wishes(canvas: tuple[int, ...]) -> list[hand_tables.Wish]:
        first = (A, 0.9) if canvas[1] == MASK or canvas[2] != MASK else (D, 0.5)
        return [first, (B, 0.95), (C, 0.6), (C, 0.55)]

    rollout = hand_tables.decode(wishes, 4, "hierarchical", TAKE_BACK)
    assert hand_tables.states(rollout) == [[MASK] * 4, [A, B, MASK, MASK], [MASK, B, C, C], [A, B, C, C]]
    assert hand_tables.happened(rollout, EventKind.REMASK) == [(1, 0, A)]


def test_a_token_that_is_still_the_best_stays_though_it_is_doubted():
    def wishes(canvas: tuple[int, ...]) -> list[hand_tables.Wish]:
        return [(A, 0.9) if canvas[1] == MASK else (A, 0.3), (B, 0.95), (C, 0.2)]

    rollout = hand_tables.decode(wishes, 3, "hierarchical", TAKE_BACK)
    assert hand_tables.states(rollout) == [[MASK] * 3, [A, B, MASK], [A, B, C]]
    assert rollout.trace.commit_step.tolist() == [[0, 0, 1]]


# --- credit -----------------------------------------------------------------------------------------------------------


def credited(memory: dict[str, Any], row: Row, logits: Tensor, weight: float, power: float, decay: float) -> Tensor:
    """Logits with credit, kept as the whole matrix of slots and tokens; starts anew with each block."""
    if row.block_step == 0:
        memory["credit"] = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
    memory["credit"] *= decay
    allowed = logits.clone()
    allowed[:, MASK] = -torch.inf
    for i in row.open:
        token = int(allowed[i].argmax())
        memory["credit"][i, token] += logits[i].softmax(-1)[token] ** power
    return logits + weight * (1 + memory["credit"]).log()


SETTINGS = [(0.7, 0.2, 0.8), (3.0, 1.0, 0.95), (2.0, 0.5, 1.0), (2.0, 0.5, 0.0)]


@pytest.mark.parametrize(("weight", "power", "decay"), SETTINGS)
def test_credit_follows_its_definition(weight: float, power: float, decay: float):
    rollout = generate("credit", threshold=0.7, weight=weight, power=power, decay=decay)
    for index, prompt in enumerate(PROMPTS):
        memory: dict[str, Any] = {}

        def look(row: Row, prompt: list[int] = prompt, memory: dict[str, Any] = memory) -> Tensor:
            return credited(memory, row, look_at(prompt)(row), weight, power, decay)

        def rule(row: Row, logits: Tensor) -> set[int]:
            return {i for i in row.open if row.p[i] >= 0.7} or {row.best(row.open)}

        assert_decodes(rollout, index, decode(LENGTH, BLOCK, look, rule))
    assert not torch.equal(rollout.trace.commit_step, generate("threshold", threshold=0.7).trace.commit_step)


def test_without_weight_credit_is_the_threshold():
    for temperature in (0.0, 0.8):
        plain = generate("threshold", temperature, threshold=0.6)
        assert_same_rows(generate("credit", temperature, threshold=0.6, weight=0), plain)


def test_draws_are_from_the_credited_distribution_and_raw_log_probs_are_the_models_own():
    settings = {"weight": 3.0, "power": 0.5, "decay": 0.9}
    rollout = generate("credit", temperature=0.8, threshold=0.7, **settings)
    states, steps, trace = list(rollout.states()), rollout.trace.commit_step, rollout.trace
    assert trace.log_prob is not None
    for index, prompt in enumerate(PROMPTS):
        row, memory = Row(LENGTH), {}
        for step in range(int(trace.steps[index])):
            state = states[step][index]
            block = range(0, BLOCK) if MASK in state[:BLOCK] else range(BLOCK, LENGTH)
            row.block_step = row.block_step + 1 if block == row.block and step else 0
            row.block, row.canvas = block, state.tolist()
            logits = row_logits(denoiser(), prompt, state)
            fused = credited(memory, row, logits, **settings)
            for i in (steps[index] == step).nonzero().squeeze(-1).tolist():
                token = int(rollout.canvas[index, i])
                raw = logits[i].log_softmax(-1)[token]
                drawn = sampling_distribution(fused[i], MASK, 0.8, 1.0, 0)[token].log()
                assert trace.raw_log_prob[index, i].item() == pytest.approx(raw.item(), abs=1e-9)
                assert trace.log_prob[index, i].item() == pytest.approx(drawn.item(), abs=1e-9)


def test_credit_is_not_handed_on():
    """What rows earn dies with them: the same rows again, and rows in another call's company, come out the same."""
    engine = RolloutEngine(denoiser())
    config = DecodingConfig(canvas_length=LENGTH, schedule="credit", schedule_args={"weight": 3.0, "decay": 1.0})
    first = engine.generate(PROMPTS, config)
    assert_same_rows(engine.generate(PROMPTS[:2], config), first, [0, 1])


# --- smoothing --------------------------------------------------------------------------------------------------------


def test_smoothing_follows_its_definition():
    start, fall, low = 0.8, 0.06, 0.5
    weight, growth, most, temperature = 0.4, 0.1, 0.6, 0.7
    arguments = {
        "threshold": low, "start_threshold": start, "threshold_decay": fall, "weight": weight,
        "weight_growth": growth, "max_weight": most, "mixture_temperature": temperature,
    }  # fmt: skip
    rollout = generate("smoothing", **arguments)
    model = denoiser()
    table = model.get_input_embeddings().weight.detach()
    for index, prompt in enumerate(PROMPTS):

        def look(row: Row, prompt: list[int] = prompt) -> Tensor:
            embeddings = table[[*prompt, *row.canvas]]
            if row.step:
                share = min(weight + growth * (row.step - 1), most)
                for i in row.masked:  # of later blocks too
                    embeddings[len(prompt) + i] += share * row.memory["predictions"][i] @ table
            with torch.no_grad():
                logits = model(inputs_embeds=embeddings[None]).logits[0, len(prompt) :]
            row.memory["predictions"] = (logits / temperature).softmax(-1)
            return logits

        def rule(row: Row, logits: Tensor) -> set[int]:
            cut = max(start - fall * row.step, low)
            return {i for i in row.open if row.p[i] >= cut} or {row.best(row.open)}

        assert_decodes(rollout, index, decode(LENGTH, BLOCK, look, rule))
    assert not torch.equal(rollout.trace.commit_step, generate("threshold", threshold=low).trace.commit_step)
    assert not rollout.exact


def test_without_weight_and_fall_smoothing_is_the_threshold():
    settings = {"threshold": 0.6, "start_threshold": 0.0, "weight": 0.0, "weight_growth": 0.0}
    for temperature in (0.0, 0.8):
        plain = generate("threshold", temperature, threshold=0.6)
        assert_same_rows(generate("smoothing", temperature, **settings), plain)


# --- settings and stopping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["hierarchical", "credit"])
def test_after_the_block_with_the_end_nothing_is_decoded(schedule: str):
    wishes = hand_tables.always(*[(hand_tables.EOS, 0.6)] * LENGTH)
    settings = {"block_length": BLOCK, "stop_at_eos": "block"}
    rollout = hand_tables.decode(wishes, LENGTH, schedule, {"threshold": 0.7}, **settings)
    assert rollout.canvas.tolist() == [[hand_tables.EOS] * LENGTH]
    assert (rollout.trace.commit_step[0, :BLOCK] >= 0).all()
    assert (rollout.trace.commit_step[0, BLOCK:] == -1).all()


BAD = {
    "hierarchical": [
        {"threshold": -1},
        {"low_threshold": None},
        {"remask_threshold": 1.5},
        {"threshold": float("nan")},
    ],
    "credit": [{"decay": 1.2}, {"weight": -1}, {"power": float("inf")}, {"weight": True}],
    "smoothing": [{"mixture_temperature": 0}, {"weight": float("inf")}, {"threshold_decay": -0.1}],
}


@pytest.mark.parametrize(("schedule", "arguments"), [(name, a) for name, several in BAD.items() for a in several])
def test_settings_outside_of_what_is_allowed(schedule: str, arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}=.* is not allowed"):
        DecodingConfig(schedule=schedule, schedule_args=arguments)


def test_smoothing_needs_whole_forwards():
    with pytest.raises(ValueError, match="cache='prefix' cannot be used with schedule='smoothing'"):
        DecodingConfig(schedule="smoothing", cache="prefix")
