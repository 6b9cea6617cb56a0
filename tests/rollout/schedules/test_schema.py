"""The preset `schema`: how many tokens each step fills, and what it is without a template."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.table_model import TableModel, constant_table


def counts(length: int, given_slots: int, steps: int | None, **arguments: Any) -> list[int]:
    """How many tokens each step writes."""
    config = DecodingConfig(canvas_length=length, schedule="schema", steps=steps, schedule_args=arguments)
    engine = RolloutEngine(TableModel(constant_table([1.0, 0.0, 0.0]), 3, mask_token_id=2, eos_token_ids=()))
    rollout = engine.generate([[0]], config, hints=[dict.fromkeys(range(given_slots), 1)])
    assert rollout.nfe.tolist() == rollout.trace.steps.tolist()
    written = rollout.trace.commit_step[0]
    return [int((written == step).sum()) for step in range(int(rollout.trace.steps))]


@settings(max_examples=25)
@given(slots=st.integers(0, 40), given_slots=st.integers(0, 3), steps=st.one_of(st.none(), st.integers(1, 45)))
def test_each_step_fills_an_equal_share_of_the_slots(slots: int, given_slots: int, steps: int | None):
    if slots + given_slots == 0:
        return
    share = -(-slots // (steps or 16))
    written = counts(slots + given_slots, given_slots, steps)
    assert sum(written) == slots and len(written) <= (steps or 16)
    assert all(count == share for count in written[:-1])


def test_nothing_open_costs_nothing():
    assert counts(5, 5, None) == []


def test_a_number_of_tokens_may_be_given_and_the_last_step_fills_the_rest():
    assert counts(20, 2, 4, tokens_per_step=3) == [3, 3, 3, 9]
    assert counts(20, 2, 8, tokens_per_step=5) == [5, 5, 5, 3]


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_an_open_template_is_low_confidence_in_one_block(steps: int):
    shared = {"canvas_length": 12, "steps": steps, "temperature": 0.8}
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, DecodingConfig(**shared, schedule="schema"))
    plain = RolloutEngine(denoiser()).generate(PROMPTS, DecodingConfig(**shared, schedule="low_confidence"))
    assert_same_rows(rollout, plain)


def test_rows_have_their_own_templates():
    hints = [{0: 5}, {}, dict.fromkeys(range(9), 7), {11: 3, 4: 4}, dict.fromkeys(range(12), 6)]
    config = DecodingConfig(canvas_length=12, schedule="schema", steps=4, stop_at_eos=False)
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config, hints=hints)
    assert rollout.nfe.tolist() == [4, 4, 3, 4, 0]
    for state in [*rollout.states(), rollout.canvas]:
        for row, given_tokens in enumerate(hints):
            assert all(state[row, offset] == token for offset, token in given_tokens.items())
    alone = RolloutEngine(denoiser(), max_batch_rows=1).generate(PROMPTS, config, hints=hints)
    assert_same_rows(alone, rollout)
    assert torch.equal(rollout.hinted.sum(-1), torch.tensor([len(row) for row in hints]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"block_length": 4}, "block_length=4.*as a whole"),
        ({"schedule_args": {"tokens_per_step": 0}}, "tokens_per_step=0"),
    ],
)
def test_bad_settings_are_refused(more: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**{"canvas_length": 12, "schedule": "schema", **more})
