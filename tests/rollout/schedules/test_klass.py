"""KLASS: confident and no longer changing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import coarse_divergence
from tests.rollout.denoisers import MASK as MODEL_MASK, PROMPTS, denoiser, row_logits
from tests.rollout.schedules.canvases import EOS, MASK, VOCAB, counts, decode, model_of, order, peaks, same
from tests.rollout.table_model import TableModel

CONFIDENCES = [0.95, 0.6, 0.92, 0.3, 0.97, 0.91, 0.5, 0.4]


def distributions(seed: int, rows: int = 20, vocab: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_the_divergence_of_all_tokens_is_exact():
    now, before = distributions(1), distributions(2)
    now[:, 3] = -torch.inf
    now = now.log_softmax(-1)
    expected = torch.nn.functional.kl_div(before, now, log_target=True, reduction="none").nan_to_num().sum(-1)
    tokens = before.topk(12).indices
    torch.testing.assert_close(coarse_divergence(now, tokens, before.gather(-1, tokens)), expected, rtol=0, atol=1e-12)


def test_the_divergence_of_some_tokens_never_exceeds_it():
    now, before = distributions(1), distributions(2)
    values = []
    for kept in (1, 3, 6, 12):
        tokens = before.topk(kept).indices
        values.append(coarse_divergence(now, tokens, before.gather(-1, tokens)))
    for fewer, more in itertools.pairwise(values):
        assert bool((fewer <= more + 1e-12).all())
    assert bool((values[0] >= 0).all()) and bool((values[0] < values[-1]).any())
    tokens = now.topk(4).indices
    same_again = coarse_divergence(now, tokens, now.gather(-1, tokens))
    torch.testing.assert_close(same_again, torch.zeros_like(same_again), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("history", "waits"), [(1, 1), (2, 2), (3, 3)])
def test_what_does_not_change_is_ready_after_so_many_steps(history: int, waits: int):
    rollout = decode(model_of(peaks(CONFIDENCES)), 8, "klass", steps=8, threshold=0.7, history=history)
    confident = [4, 0, 2, 5]
    first = [[slot] for slot in confident[:waits]]
    together = [sorted(confident[waits:])] if waits < 4 else []
    assert order(rollout) == [*first, *together, [1], [6], [7], [3]]


def test_history_starts_anew_in_each_block():
    model = model_of([[0.25, 0.0, 0.0, 0.75, 0.0, 0.0]] * 12)
    rollout = decode(model, 12, "klass", steps=12, block_length=6, threshold=0.7)
    assert counts(rollout) == [1, 1, 4, 1, 1, 4]


def test_what_changes_is_not_ready():
    """The slots behind the first two change their token's rivals with everything that is written."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        logits = torch.full((len(tokens), VOCAB), -4.0, dtype=torch.float64)
        logits[:, 3] = 1.0
        logits[3:, 2 if tokens.count(MASK) % 2 else 4] = 0.0
        return logits

    model = TableModel(table, VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))
    settings: dict[str, Any] = {"steps": 6, "threshold": 0.5, "history": 1}
    rollout = decode(model, 6, "klass", **settings)
    assert order(rollout) == [[0], [1], [2], [3], [4], [5]]
    # A divergence of all others taken as one does not see it.
    coarse = decode(model, 6, "klass", **settings, kl_tokens=1)
    assert counts(coarse) == [1, 5]
    loose = decode(model, 6, "klass", **settings, kl_threshold=10.0)
    assert counts(loose) == [1, 5]


@pytest.mark.parametrize("settings", [{"threshold": 1.1}, {"kl_threshold": 0.0}, {"history": 100}])
def test_where_nothing_is_ready_it_is_low_confidence(settings: dict[str, Any]):
    ours = decode(denoiser(), 12, "klass", PROMPTS, steps=6, block_length=6, **settings)
    assert same(ours, decode(denoiser(), 12, "low_confidence", PROMPTS, steps=6, block_length=6))


def test_a_step_with_something_ready_writes_nothing_else():
    model = model_of(peaks([0.95, 0.9, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.8, 0.7, 0.2, 0.25]))
    rollout = decode(model, 12, "klass", steps=4, threshold=0.6, history=1)  # shares of three
    assert order(rollout) == [[0, 1, 8], [9], [5, 6, 7], [2, 3, 4], [10, 11]]


def test_what_is_ready_by_definition():
    """From the model's own predictions for the recorded states."""
    threshold, limit, length = 0.4, 0.5, 10
    rollout = decode(denoiser(), length, "klass", PROMPTS, steps=length, threshold=threshold, kl_threshold=limit)
    several = 0
    for i, prompt in enumerate(PROMPTS):
        before, steady = None, torch.zeros(length)
        for state, written in zip(rollout.states(), order(rollout, i), strict=False):
            now = row_logits(denoiser(), prompt, state[i]).log_softmax(-1)
            if before is not None:
                moved = (now.exp() * (now - before)).sum(-1)
                steady = torch.where(moved < limit, steady + 1, 0)
            before, masked = now, state[i] == MODEL_MASK
            confidence = now.exp().amax(-1)
            ready = set((masked & (confidence > threshold) & (steady >= 2)).nonzero().squeeze(-1).tolist())
            best = int(confidence.masked_fill(~masked, -1).argmax())
            assert set(written) == (ready or {best})
            several += len(ready) > 1
    assert several > 0


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", -1), ("kl_threshold", math.nan), ("history", 0), ("kl_tokens", 1.5)]
)
def test_settings_that_make_no_sense(name: str, value: object):
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        DecodingConfig(schedule="klass", schedule_args={name: value})
