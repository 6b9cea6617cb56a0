"""EDLM: the distribution of what is kept, against enumeration, and what is recorded of it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import inverse_cdf, keyed_uniform
from tests.rollout.causal_models import random_causal, table_causal
from tests.rollout.chi_square import chi_square
from tests.rollout.denoisers import PROMPTS, VOCAB, assert_same_rows, denoiser
from tests.rollout.table_model import TableModel, random_table

SIZE, MASK, EOS, PROMPT = 4, 3, 2, [0]
DENOISER = random_table(3, SIZE, 1.0)


@functools.cache
def next_logits(tokens: tuple[int, ...]) -> Tensor:
    code = functools.reduce(lambda value, token: value * (SIZE + 1) + token + 1, tokens, 0)
    generator = torch.Generator().manual_seed(code)
    return 1.5 * torch.randn(SIZE, generator=generator, dtype=torch.float64)


def proposal(state: list[int], temperature: float = 1.0) -> Tensor:
    """q for each slot, `[L, V]`."""
    logits = DENOISER((*PROMPT, *state))[len(PROMPT) :].clone()
    logits[:, MASK] = -torch.inf
    return (logits / temperature).softmax(-1)


def valid(canvas: tuple[int, ...]) -> int:
    """Tokens up to and including the first end."""
    return canvas.index(EOS) + 1 if EOS in canvas else len(canvas)


def weight(canvas: tuple[int, ...], q: Tensor, given: dict[int, int]) -> float:
    """exp(-E) = p / q."""
    p = 1.0
    for slot in range(valid(canvas)):
        p *= next_logits((*PROMPT, *canvas[:slot])).softmax(-1)[canvas[slot]].item()
        p /= 1.0 if slot in given else q[slot, canvas[slot]].item()
    return p


def decode(rows: int, length: int, *, hints: dict[int, int] | None = None, **settings: Any) -> Any:
    arguments = {"energy": table_causal(next_logits, SIZE), **settings.pop("schedule_args", {})}
    config = DecodingConfig(
        **{"canvas_length": length, "schedule": "edlm", "temperature": 1.0, "schedule_args": arguments, **settings}
    )
    engine = RolloutEngine(TableModel(DENOISER, SIZE, mask_token_id=MASK, eos_token_ids=(EOS,)))
    return engine.generate([PROMPT], config, num_generations=rows, hints=[hints or {}] * rows)


@pytest.mark.parametrize("given", [{}, {1: 1}], ids=["all open", "one given"])
def test_one_of_two_drafts_is_kept_in_proportion_to_p_over_q(given: dict[int, int]):
    rows, length = 2500, 3
    rollout = decode(rows, length, steps=1, hints=given)
    q = proposal([given.get(slot, MASK) for slot in range(length)])
    canvases = [c for c in itertools.product(range(3), repeat=length) if all(c[slot] == t for slot, t in given.items())]
    drawn = {c: torch.stack([q[s, c[s]] for s in range(length) if s not in given]).prod().item() for c in canvases}
    weights = {c: weight(c, q, given) for c in canvases}
    expected = {
        c: sum(2 * drawn[c] * drawn[other] * weights[c] / (weights[c] + weights[other]) for other in canvases)
        for c in canvases
    }
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(canvases, 0)
    for row in rollout.canvas.tolist():
        counts[tuple(row)] += 1
    kept = sorted(canvases, key=expected.__getitem__)
    rare, often = kept[: len(kept) // 3], kept[len(kept) // 3 :]  # few draws of each of the rare ones: counted together
    merged = [[sum(value[c] for c in rare), *(value[c] for c in often)] for value in (counts, expected)]
    chi_square(torch.tensor(merged[0]), torch.tensor(merged[1]))
    assert rollout.extra_forwards.tolist() == [2] * rows


def test_the_record_has_the_proposal_and_the_choice_among_drafts():
    rows, length, temperature = 60, 3, 0.7
    rollout = decode(rows, length, steps=1, temperature=temperature, stop_at_eos=False)
    q = proposal([MASK] * length, temperature)
    raw = DENOISER((*PROMPT, *[MASK] * length))[1:].log_softmax(-1)
    slots, changed = torch.arange(length), 0
    for row in range(rows):
        key = torch.tensor(row), torch.tensor(0)
        drafts = [
            tuple(inverse_cdf(q, keyed_uniform(0, purpose, *key, slots)).tolist()) for purpose in ("token", "draft 1")
        ]
        weights = torch.tensor([weight(draft, q, {}) for draft in drafts], dtype=torch.float64)
        kept = int(keyed_uniform(0, "draft", *key, torch.tensor(0)) * weights.sum() >= weights[0])
        changed += kept
        assert rollout.canvas[row].tolist() == list(drafts[kept])
        expected = (weights[kept] / weights.sum()).log()
        torch.testing.assert_close(rollout.trace.selection_log_prob[row, 0], expected, rtol=0, atol=1e-9)
        for slot, token in enumerate(drafts[kept]):
            torch.testing.assert_close(rollout.trace.log_prob[row, slot], q[slot, token].log(), rtol=0, atol=1e-9)
            torch.testing.assert_close(rollout.trace.raw_log_prob[row, slot], raw[slot, token], rtol=0, atol=1e-9)
    assert 10 < changed < 50, "both drafts are kept now and then"


@pytest.mark.parametrize("order", ["random", "low_confidence"])
@pytest.mark.parametrize("arguments", [{"drafts": 1}, {"drafts": 3, "window": (0.0, 0.0)}], ids=["k = 1", "no window"])
def test_without_a_choice_it_is_the_plain_schedule(order: str, arguments: dict[str, Any]):
    shared = {"canvas_length": 12, "steps": 6, "block_length": 6, "temperature": 1.0}
    config = DecodingConfig(
        **shared, schedule="edlm", schedule_args={"energy": random_causal(VOCAB), "order": order, **arguments}
    )
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config, num_generations=2)
    plain = RolloutEngine(denoiser()).generate(PROMPTS, DecodingConfig(**shared, schedule=order), num_generations=2)
    assert_same_rows(rollout, plain)
    chosen = rollout.trace.selection_log_prob
    assert chosen is None if arguments["drafts"] == 1 else not chosen.any()


def test_drafts_are_weighed_within_the_window():
    arguments = {"energy": random_causal(VOCAB), "drafts": 3, "window": (0.5, 0.8)}
    config = DecodingConfig(
        canvas_length=10, steps=10, schedule="edlm", temperature=1.0, schedule_args=arguments, stop_at_eos=False
    )
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config)
    assert rollout.nfe.tolist() == [10] * 5
    assert rollout.extra_forwards.tolist() == [3 * 4] * 5  # at open shares 0.8, 0.7, 0.6 and 0.5
    chosen = rollout.trace.selection_log_prob
    assert bool((chosen[:, 2:6] < 0).all()) and not chosen[:, :2].any() and not chosen[:, 6:].any()


def test_each_row_has_its_own_noise_level():
    arguments = {"energy": random_causal(VOCAB), "drafts": 2, "window": (0.55, 1.0)}
    config = DecodingConfig(
        canvas_length=10, steps=10, schedule="edlm", temperature=1.0, schedule_args=arguments, stop_at_eos=False
    )
    hints = [dict.fromkeys(range(given), 5) for given in (0, 5, 8, 10, 2)]
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config, hints=hints)
    steps = [sum(left / slots >= 0.55 for left in range(1, slots + 1)) for slots in (10, 5, 2, 0, 8)]
    assert steps == [5, 3, 1, 0, 4] and rollout.extra_forwards.tolist() == [2 * n for n in steps]


def test_more_drafts_come_closer_to_the_causal_model():
    def mean_log_p(drafts: int) -> float:
        rollout = decode(400, 3, steps=1, schedule_args={"drafts": drafts})
        texts = [tuple(row) for row in rollout.canvas.tolist()]
        logs = [
            sum(next_logits((*PROMPT, *t[:s])).log_softmax(-1)[t[s]].item() for s in range(valid(t))) for t in texts
        ]
        return sum(logs) / len(logs)

    few, some, many = mean_log_p(1), mean_log_p(3), mean_log_p(12)
    assert few + 0.1 < some < many - 0.1


BAD = [
    ({}, {}, "energy=None"),
    ({"energy": "x", "drafts": 0}, {}, "drafts=0"),
    ({"energy": "x"}, {"temperature": 0.0}, "drafts=2 needs a temperature above 0"),
    ({"energy": "x", "window": (0.5, 0.4)}, {}, "window=.*smallest <= largest"),
    ({"energy": "x", "window": 0.5}, {}, "window=0.5"),
    ({"energy": "x", "window": (0.5, "1")}, {}, "window="),
    ({"energy": "x", "order": "left"}, {}, "order='left'.*random, low_confidence"),
]


@pytest.mark.parametrize(("arguments", "more", "message"), BAD)
def test_bad_settings_are_refused(arguments: dict[str, Any], more: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**{"schedule": "edlm", "temperature": 1.0, "schedule_args": arguments, **more})


def test_an_energy_of_another_vocabulary_is_refused_before_decoding():
    config = DecodingConfig(
        canvas_length=4, schedule="edlm", temperature=1.0, schedule_args={"energy": random_causal(VOCAB + 1)}
    )
    with pytest.raises(ValueError, match="25 tokens and the denoiser 24"):
        RolloutEngine(denoiser()).generate(PROMPTS, config)
