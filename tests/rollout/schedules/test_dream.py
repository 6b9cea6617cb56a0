"""Dream's schedules: shares of time, three kinds of certainty, drawn positions and a budget."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.noise import KeyedNoise
from rl4dlm.rollout.schedules.dream import draw_positions, floored_counts, rounded_counts, time_shares
from tests.rollout.denoisers import MASK, PROMPTS, denoiser, row_logits
from tests.rollout.schedules.canvases import counts, decode, model_of, order, peaks, same
from tests.rollout.table_model import TableModel, random_table

CERTAIN = ["dream_maskgit_plus", "dream_topk_margin", "dream_entropy"]


def simulated(length: int, steps: int, count: Any) -> list[int]:
    """How many of `length` slots each step writes."""
    left, written = length, []
    for j in range(steps):
        if not left:
            break
        step = SimpleNamespace(
            eligible=torch.arange(length)[None] < left,
            masked_at_start=torch.tensor([length]),
            step=torch.tensor([j]),
            tokens=torch.zeros(1, length),
        )
        written.append(min(left, int(count(step))))
        left -= written[-1]
    return [*written, *([left] if left else [])]


# --- numbers of tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "steps", "expected"),
    [
        (256, 64, [3] + [4] * 62 + [5]),
        (512, 256, [1] + [2] * 254 + [3]),
        (32, 32, [0] + [1] * 30 + [2]),
        (7, 1, [7]),
    ],
)
def test_rounding_each_share_down(length: int, steps: int, expected: list[int]):
    shares = time_shares(steps, 1e-3)
    assert simulated(length, steps, lambda step: floored_counts(step, shares)) == expected


@given(length=st.integers(1, 80), steps=st.integers(1, 80))
def test_rounding_the_cumulative_number(length: int, steps: int):
    written = simulated(length, steps, lambda step: rounded_counts(step, steps))
    assert len(written) == min(length, steps) and sum(written) == length
    if steps <= length:
        assert max(written) - min(written) <= 1
        for j, total in enumerate(itertools.accumulate(written), start=1):
            assert total == math.floor(length * j / steps + 0.5)


@pytest.mark.parametrize("name", CERTAIN)
def test_an_idle_step_only_where_it_is_asked_for(name: str):
    released = decode(denoiser(), 8, name, PROMPTS, steps=8, counts="floor")
    assert [counts(released, i) for i in range(len(PROMPTS))] == [[0, 1, 1, 1, 1, 1, 1, 2]] * len(PROMPTS)
    assert released.nfe.tolist() == [8] * len(PROMPTS)
    even = decode(denoiser(), 8, name, PROMPTS, steps=8)
    assert [counts(even, i) for i in range(len(PROMPTS))] == [[1] * 8] * len(PROMPTS)
    assert decode(denoiser(), 8, name, PROMPTS, steps=20).nfe.tolist() == [8] * len(PROMPTS)


def test_numbers_are_those_of_each_row():
    hints = [{}, {1: 3, 2: 4, 5: 3, 6: 7}, dict.fromkeys(range(7), 5)]
    rollout = decode(denoiser(), 8, "dream_entropy", PROMPTS[:3], steps=4, counts="floor", hints=hints)
    assert [counts(rollout, i) for i in range(3)] == [[1, 2, 2, 3], [0, 1, 1, 2], [0, 0, 0, 1]]
    rollout = decode(denoiser(), 8, "dream_entropy", PROMPTS[:3], steps=4, hints=hints)
    assert [counts(rollout, i) for i in range(3)] == [[2, 2, 2, 2], [1, 1, 1, 1], [1]]
    for i, given_tokens in enumerate(hints):
        for state in rollout.states():
            assert all(int(state[i, offset]) == token for offset, token in given_tokens.items())


def test_blocks_have_their_own_steps():
    rollout = decode(denoiser(), 8, "dream_maskgit_plus", PROMPTS, steps=4, block_length=4, counts="floor")
    assert counts(rollout) == [1, 3, 1, 3]
    assert all(max(a) < 4 <= min(b) for a, b in zip(order(rollout)[:2], order(rollout)[2:], strict=True))


# --- certainty --------------------------------------------------------------------------------------------------------

ENTROPY, PROBABILITY, MARGIN = [0.0, 0.0, 0.45, 0.55, 0.0, 0.0], [0.2, 0.0, 0.0, 0.6, 0.2, 0.0], [0.084] * 6
MARGIN[3] = 1 - 5 * 0.084


@pytest.mark.parametrize(("name", "first"), list(zip(CERTAIN, [1, 2, 0], strict=True)))
def test_three_kinds_of_certainty(name: str, first: int):
    rollout = decode(model_of([ENTROPY, PROBABILITY, MARGIN]), 3, name, steps=3)
    assert order(rollout)[0] == [first]


@pytest.mark.parametrize("name", CERTAIN)
def test_certainty_is_that_of_what_the_filter_leaves(name: str):
    model = model_of(peaks([0.3, 0.5, 0.9, 0.4]))
    assert order(decode(model, 4, name, steps=4)) == [[2], [1], [3], [0]]
    assert order(decode(model, 4, name, steps=4, top_k=1)) == [[0], [1], [2], [3]]
    # 0.5 and 0.9 hold this share alone, and so tie.
    assert order(decode(model, 4, name, steps=4, top_p=0.45)) == [[1], [2], [3], [0]]


def test_certainty_is_tempered():
    two, one = [0.4, 0.0, 0.0, 0.6, 0.0, 0.0], [0.06] * 3 + [0.7] + [0.06] * 2  # sharpening helps the second more
    model = model_of([two, one])
    assert order(decode(model, 2, "dream_entropy", steps=2)) == [[0], [1]]
    assert order(decode(model, 2, "dream_entropy", steps=2, temperature=0.3)) == [[1], [0]]


def test_confidence_is_low_confidence_without_filter_and_temperature():
    ours = decode(denoiser(), 10, "dream_maskgit_plus", PROMPTS, steps=5)
    assert same(ours, decode(denoiser(), 10, "low_confidence", PROMPTS, steps=5))


# --- drawn positions --------------------------------------------------------------------------------------------------


def drawn(weights: list[float], count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Which slots each of many rows draws, and the log-probabilities of the draws."""
    noise, shape = KeyedNoise(3), (rows, len(weights))
    ids = torch.arange(rows)[:, None].expand(shape)

    def uniform(purpose: str, where: Tensor) -> Tensor:
        slots = torch.arange(len(weights)).expand(shape)
        return noise.uniform(purpose, ids.flatten(), torch.zeros_like(ids).flatten(), slots.flatten()).view(shape)

    step = SimpleNamespace(
        eligible=torch.tensor([w >= 0 for w in weights]).expand(shape),
        offsets=torch.arange(len(weights)),
        uniform=uniform,
        selection_log_prob=torch.zeros(rows, dtype=torch.float64),
    )
    logits = torch.tensor(weights, dtype=torch.float64).clamp(min=1e-9).log().expand(shape)
    return draw_positions(step, logits, torch.full((rows,), count)), step.selection_log_prob


def test_draws_without_replacement():
    """Frequencies of pairs, and of log-probabilities, are those of two draws in turn."""
    weights, rows = [1.0, -1.0, 2.0, 5.0], 20_000
    slots, log_prob = drawn(weights, 2, rows)
    open_weights = {i: w for i, w in enumerate(weights) if w >= 0}
    total = sum(open_weights.values())
    turns = {(a, b): open_weights[a] / total * open_weights[b] / (total - open_weights[a])
             for a, b in itertools.permutations(open_weights, 2)}  # fmt: skip
    for pair in itertools.combinations(open_weights, 2):
        expected = turns[pair] + turns[pair[::-1]]
        found = slots[:, list(pair)].all(-1)
        assert float(found.double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(expected / rows))
        either = torch.tensor([math.log(turns[pair]), math.log(turns[pair[::-1]])], dtype=torch.float64)
        which = (log_prob[found, None] - either).abs()
        assert float(which.amin(-1).max()) < 1e-9
        share = float((which[:, 0] < which[:, 1]).double().mean())
        assert share == pytest.approx(turns[pair] / expected, abs=0.03)
    assert bool((slots.sum(-1) == 2).all()) and not bool(slots[:, 1].any())


def test_a_drawn_position_is_recorded_step_by_step():
    model, temp = model_of(peaks([0.3, 0.5, 0.9, 0.4])), 0.2
    rollout = decode(model, 4, "dream_maskgit_plus", steps=4, alg_temp=temp, num_generations=30)
    logits, orders = torch.tensor([0.3, 0.5, 0.9, 0.4], dtype=torch.float64) / temp, set()
    assert rollout.trace.selection_log_prob is not None
    for i in range(30):
        left = [0, 1, 2, 3]
        orders.add(tuple(slot for [slot] in order(rollout, i)))
        for step, [slot] in enumerate(order(rollout, i)):
            expected = logits[left].log_softmax(0)[left.index(slot)]
            assert float(rollout.trace.selection_log_prob[i, step]) == pytest.approx(float(expected), abs=1e-9)
            left.remove(slot)
    assert len(orders) > 5


@pytest.mark.parametrize("settings", [{}, {"counts": "floor"}])
@pytest.mark.parametrize("name", CERTAIN)
def test_a_cold_draw_takes_the_most_certain(name: str, settings: dict[str, Any]):
    model = TableModel(random_table(4, 6), 6, mask_token_id=5)
    greedy = decode(model, 7, name, [[2], [3, 4]], steps=4, **settings)
    cold = decode(model, 7, name, [[2], [3, 4]], steps=4, alg_temp=1e-9, **settings)
    assert same(greedy, cold)
    assert greedy.trace.selection_log_prob is None
    assert cold.trace.selection_log_prob is None or float(cold.trace.selection_log_prob.abs().max()) < 1e-6


def test_deferred_candidates_are_drawn_last():
    model = model_of(peaks([0.9, 0.5, 0.9, 0.4], tokens=[4, 3, 4, 3]))
    for seed in range(5):
        rollout = decode(model, 4, "dream_entropy", steps=2, alg_temp=1.0, defer_token_ids=(4,), seed=seed)
        assert order(rollout) == [[1, 3], [0, 2]]
        assert bool(rollout.trace.selection_log_prob.isfinite().all())


# --- origin -----------------------------------------------------------------------------------------------------------


def test_ancestral_sampling_follows_the_time():
    length, steps, rows, eps = 24, 5, 300, 0.2
    model = model_of(peaks([0.5] * length))
    rollout = decode(model, length, "dream_origin", steps=steps, eps=eps, num_generations=rows)
    commit = rollout.trace.commit_step
    for j in range(steps - 1):
        time = 1 - (1 - eps) * (j + 1) / steps
        masked = float((commit > j).double().mean())
        assert masked == pytest.approx(time, abs=4 * math.sqrt(time * (1 - time) / (length * rows)))
    assert int(rollout.nfe.max()) <= steps and bool((commit >= 0).all())


def test_the_draw_of_each_position_is_recorded():
    steps, eps = 4, 0.1
    rollout = decode(denoiser(), 6, "dream_origin", PROMPTS, steps=steps, eps=eps, hints=[{}, {0: 3}, {}, {}, {}])
    times = [1 - (1 - eps) * j / steps for j in range(steps)]
    assert rollout.trace.selection_log_prob is not None
    for i in range(len(PROMPTS)):
        left = 6 - int(rollout.hinted[i].sum())
        for j, written in enumerate(order(rollout, i)):
            share = 1.0 if j == steps - 1 else 1 - times[j + 1] / times[j]
            stayed = left - len(written)
            expected = len(written) * math.log(share) + (stayed * math.log(1 - share) if stayed else 0.0)
            assert float(rollout.trace.selection_log_prob[i, j]) == pytest.approx(expected, abs=1e-5)
            left = stayed


def test_a_step_of_ancestral_sampling_may_write_nothing():
    rollout = decode(denoiser(), 4, "dream_origin", [PROMPTS[0]], steps=30, num_generations=5)
    assert all(0 in counts(rollout, i) for i in range(5))
    assert int(rollout.nfe.max()) <= 30 and not bool((rollout.canvas == MASK).any())


def test_deferred_candidates_wait_for_the_last_step():
    model = model_of(peaks([0.9, 0.5, 0.9, 0.4], tokens=[4, 3, 4, 3]))
    rollout = decode(model, 4, "dream_origin", steps=3, defer_token_ids=(4,), num_generations=10)
    assert rollout.trace.commit_step[:, [0, 2]].unique().tolist() == [2]
    assert rollout.trace.commit_step[:, [1, 3]].min() == 0


# --- a budget ---------------------------------------------------------------------------------------------------------


def test_the_rest_of_a_budget_is_carried():
    model = model_of(peaks([0.95, 0.2, 0.3, 0.92, 0.91, 0.19]))
    rollout = decode(model, 6, "dream_threshold", steps=3, threshold=0.9)
    assert order(rollout) == [[0, 3], [4], [2], [1], [5]]
    assert order(decode(model, 6, "dream_threshold", steps=3, threshold=0.2)) == [[0, 3], [2, 4], [1], [5]]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.95])
def test_a_threshold_only_delays(threshold: float):
    rollout = decode(denoiser(), 12, "dream_threshold", PROMPTS, steps=5, threshold=threshold)
    for i, prompt in enumerate(PROMPTS):
        written = order(rollout, i)
        assert len(written) >= 5
        for j, total in enumerate(itertools.accumulate(map(len, written)), start=1):
            assert total <= 12 * min(j, 5) // 5
        for state, slots in zip(rollout.states(), written, strict=False):
            confidence = row_logits(denoiser(), prompt, state[i]).softmax(-1).amax(-1)
            confidence[state[i] != MASK] = -1
            assert int(confidence.argmax()) in slots
            assert all(confidence[slot] >= threshold for slot in slots if slot != int(confidence.argmax()))


def test_the_ends_of_the_threshold():
    even = decode(denoiser(), 12, "dream_maskgit_plus", PROMPTS, steps=4)
    assert same(decode(denoiser(), 12, "dream_threshold", PROMPTS, steps=4, threshold=0.0), even)
    greedy = decode(denoiser(), 12, "low_confidence", PROMPTS, steps=12)
    assert same(decode(denoiser(), 12, "dream_threshold", PROMPTS, steps=4, threshold=math.inf), greedy)
    certain = decode(denoiser(), 12, "dream_threshold", PROMPTS, steps=4, threshold=1.0, top_k=1)
    assert counts(certain) == [3, 3, 3, 3]  # what equals the threshold reaches it


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        ("dream_entropy", {"alg_temp": -0.1}, "alg_temp=-0.1 is not allowed"),
        ("dream_entropy", {"alg_temp": math.inf}, "alg_temp=inf is not allowed"),
        ("dream_topk_margin", {"counts": "ceil"}, "counts='ceil' is not allowed; choose"),
        ("dream_maskgit_plus", {"eps": 0.01}, "eps=0.01 has no meaning for counts='round'"),
        ("dream_maskgit_plus", {"eps": 2, "counts": "floor"}, "eps=2 is not allowed"),
        ("dream_origin", {"eps": None}, "eps=None is not allowed"),
        ("dream_origin", {"alg_temp": 0.1}, "unknown settings"),
        ("dream_threshold", {"threshold": math.nan}, "threshold=nan is not allowed"),
    ],
)
def test_settings_that_make_no_sense(schedule: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule=schedule, schedule_args=arguments)
