"""Guided diffusion: a causal model written by hand decides which tokens of a known draft stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.causal_models import random_causal, stock_causal, table_causal
from tests.rollout.denoisers import EOS, MASK, PROMPTS, VOCAB, assert_same_rows, denoiser
from tests.rollout.table_model import TableModel

DRAFT = [1, 2, 3, 1, 2, 3]
"""What the denoiser of these tests wants to write, whatever is there."""
SIZE, M = 6, 5


def drafting(tokens: tuple[int, ...]) -> Tensor:
    """The draft behind a prompt of one token, the later the more certain."""
    logits = torch.zeros(len(tokens), SIZE, dtype=torch.float64)
    for slot, token in enumerate(DRAFT[: len(tokens) - 1]):
        logits[slot + 1, token] = 2.0 + slot
    return logits


def saying(text: list[int], second: float = 0.0) -> Any:
    """A guide that knows one text: its tokens with logit 5, the next higher ids with `second` below that."""

    def next_logits(tokens: tuple[int, ...]) -> Tensor:
        logits = torch.full((SIZE,), -9.0, dtype=torch.float64)
        expected = text[min(len(tokens) - 1, len(text) - 1)]
        logits[expected], logits[expected + 1] = 5.0, 5.0 - second if second else -9.0
        return logits

    return table_causal(next_logits, SIZE)


def decode(guide: Any, *, config: dict[str, Any] | None = None, **arguments: Any) -> Any:
    settings = DecodingConfig(
        canvas_length=6, schedule="guided", schedule_args={"guide": guide, **arguments}, **(config or {})
    )
    engine = RolloutEngine(TableModel(drafting, SIZE, mask_token_id=M, eos_token_ids=(4,)))
    return engine.generate([[0]], settings)


def test_a_draft_that_the_guide_shares_is_written_at_once():
    rollout = decode(saying(DRAFT))
    assert rollout.canvas.tolist() == [DRAFT]
    assert (rollout.nfe.tolist(), rollout.extra_forwards.tolist()) == ([1], [1])


def test_a_guide_that_never_agrees_lets_one_token_pass_from_left_to_right():
    rollout = decode(saying([4] * 6))
    assert rollout.canvas.tolist() == [DRAFT]
    assert rollout.trace.commit_step.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (rollout.nfe.tolist(), rollout.extra_forwards.tolist()) == ([6], [6])


def test_what_comes_before_the_first_objection_is_written():
    guide = saying([1, 2, 4, 1, 4, 3])  # objects to slots 2 and 4
    assert decode(guide).trace.commit_step.tolist() == [[0, 0, 1, 2, 3, 4]]
    # Step 0 writes slots 0 and 1; slot 2 stands alone next, since nothing before an objection is open; then slot 3, ...
    everything = decode(guide, accept="all")
    # All agreed slots go first; slots 2 and 4 are left, of which the more probable is forced first.
    assert everything.trace.commit_step.tolist() == [[0, 0, 2, 0, 1, 0]]
    assert everything.canvas.tolist() == [DRAFT]


@pytest.mark.parametrize(
    ("second", "arguments", "agrees"),
    [
        (0.68, {}, True),  # exp(-0.68) = 0.507
        (0.70, {}, False),  # exp(-0.70) = 0.497
        (0.70, {"ratio": 0.4}, True),
        (0.68, {"top_k": 1}, False),
        (0.68, {"top_k": 3, "ratio": 0.0}, True),
    ],
)
def test_agreement_is_being_among_the_best_and_not_much_worse(second: float, arguments: dict[str, Any], agrees: bool):
    # The guide prefers what is one below the draft, which makes the draft its second choice.
    rollout = decode(saying([token - 1 for token in DRAFT], second), **arguments)
    assert rollout.nfe.tolist() == [1 if agrees else 6]


def test_given_slots_are_read_but_not_judged():
    settings = DecodingConfig(canvas_length=6, schedule="guided", schedule_args={"guide": saying(DRAFT)})
    engine = RolloutEngine(TableModel(drafting, SIZE, mask_token_id=M, eos_token_ids=(4,)))
    rollout = engine.generate([[0]], settings, hints=[{1: 3, 2: 2}])  # the guide would object to both
    assert rollout.canvas.tolist() == [[1, 3, 2, 1, 2, 3]] and rollout.nfe.tolist() == [1]


def test_the_guide_reads_the_text_that_is_there():
    # It agrees with anything behind the given token 3, and with nothing elsewhere.
    def next_logits(tokens: tuple[int, ...]) -> Tensor:
        logits = torch.zeros(SIZE, dtype=torch.float64)
        if 3 not in tokens:
            logits[4] = 9.0
        return logits

    settings = DecodingConfig(
        canvas_length=6, schedule="guided", schedule_args={"guide": table_causal(next_logits, SIZE), "top_k": SIZE}
    )
    engine = RolloutEngine(TableModel(drafting, SIZE, mask_token_id=M, eos_token_ids=(4,)))
    rollout = engine.generate([[0]], settings, hints=[{2: 3}])
    assert rollout.trace.commit_step.tolist() == [[0, 1, -1, 2, 2, 2]]


def test_deferred_tokens_wait_though_the_guide_agrees():
    rollout = decode(saying(DRAFT), config={"defer_token_ids": (3,)})
    # Slots 2 and 5 hold token 3: the first stops the prefix, then slots 3 and 4 go one by one before it.
    assert rollout.trace.commit_step.tolist() == [[0, 0, 3, 1, 2, 4]]


def test_a_draft_ends_with_the_block():
    rollout = decode(saying(DRAFT), config={"block_length": 2})
    assert rollout.trace.commit_step.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert rollout.extra_forwards.tolist() == [3]


@pytest.mark.parametrize("accept", ["prefix", "all"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_forward_of_the_denoiser_has_one_of_the_guide(accept: str, temperature: float):
    settings = DecodingConfig(
        canvas_length=12,
        schedule="guided",
        schedule_args={"guide": random_causal(VOCAB), "accept": accept},
        temperature=temperature,
        cfg_scale=0.5,
    )
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, settings)
    assert torch.equal(rollout.extra_forwards, rollout.trace.steps)
    assert torch.equal(rollout.nfe, 2 * rollout.trace.steps)
    assert int(rollout.trace.steps.max()) <= 12
    for row, steps in enumerate(rollout.trace.steps.tolist()):
        assert set(rollout.trace.commit_step[row].tolist()) - {-1} == set(range(steps)), "each step writes something"


def test_it_works_beside_a_cache():
    arguments = {"guide": random_causal(VOCAB)}
    settings = DecodingConfig(
        canvas_length=12, block_length=4, schedule="guided", schedule_args=arguments, cache="prefix"
    )
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, settings)
    assert MASK not in rollout.canvas and torch.equal(rollout.extra_forwards, rollout.trace.steps)


def test_a_guide_is_loaded_from_a_path(tmp_path: Path):
    guide = stock_causal(VOCAB)
    guide.save_pretrained(tmp_path)

    def decoded(guide: Any) -> Any:
        settings = DecodingConfig(canvas_length=12, schedule="guided", schedule_args={"guide": guide})
        return RolloutEngine(denoiser()).generate(PROMPTS, settings)

    assert_same_rows(decoded(str(tmp_path)), decoded(guide))


def test_the_end_is_not_looked_beyond():
    # The denoiser ends at once; the guide agrees with the end.
    def ending(tokens: tuple[int, ...]) -> Tensor:
        logits = torch.zeros(len(tokens), SIZE, dtype=torch.float64)
        logits[:, 4] = 5.0
        return logits

    guide = table_causal(lambda tokens: ending(tokens)[0], SIZE)
    settings = DecodingConfig(canvas_length=6, schedule="guided", schedule_args={"guide": guide})
    engine = RolloutEngine(TableModel(ending, SIZE, mask_token_id=M, eos_token_ids=(4,)))
    assert engine.generate([[0]], settings).nfe.tolist() == [1]


BAD = [
    ({}, "guide=None.*causal language model"),
    ({"guide": "x", "top_k": 0}, "top_k=0"),
    ({"guide": "x", "ratio": 1.5}, "ratio=1.5.*0 to 1"),
    ({"guide": "x", "accept": "some"}, "accept='some'.*prefix, all"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="guided", schedule_args=arguments)


def test_a_guide_of_another_vocabulary_is_refused_before_decoding():
    for guide, message in ((random_causal(VOCAB + 1), "25 tokens and the denoiser 24"), (tiny_llada(), "a denoiser")):
        settings = DecodingConfig(canvas_length=4, schedule="guided", schedule_args={"guide": guide})
        with pytest.raises(ValueError, match=message):
            RolloutEngine(denoiser()).generate([[EOS]], settings)
