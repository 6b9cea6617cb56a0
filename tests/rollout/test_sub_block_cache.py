"""The sub-block cache: what it feeds, where it loses something and where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.rows import Progress
from tests.models.block_denoisers import PROMPTS, block_denoiser
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.schedules.examples import watched

BLOCK, SUB, LENGTH = 8, 4, 24
HINTS = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4}, {9: 3}]


def model(shift: int = 1) -> Any:
    return block_denoiser("block_causal", "position_zero", shift=shift, block_length=BLOCK)


def decoded(
    sub: int = SUB, *, cache: str = "sub_block", shift: int = 1, rows: slice = slice(None), **more: Any
) -> Rollout:
    hints = more.pop("hints", None)
    on_step = more.pop("on_step", None)
    config = DecodingConfig(
        canvas_length=LENGTH,
        schedule="sub_blocks",
        schedule_args={"sub_block_length": sub, "threshold": 0.5, "first_alone": shift == 1},
        cache=cache,
        cache_args={"sub_block_length": sub} if cache == "sub_block" else {},
        stop_at_eos=False,
        **more,
    )
    ids = list(range(len(PROMPTS)))[rows]
    return RolloutEngine(model(shift)).generate(
        PROMPTS[rows], config, seed=4, row_ids=ids, hints=None if hints is None else hints[rows], on_step=on_step
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [0, 1])
def test_it_is_exact_where_a_block_is_one_sub_block(shift: int, temperature: float):
    whole = decoded(BLOCK, shift=shift, temperature=temperature)
    assert_same_rows(whole, decoded(BLOCK, shift=shift, temperature=temperature, cache="none"))
    assert not whole.exact  # the policy promises nothing


def test_it_is_approximate_where_there_are_several():
    cached, plain = decoded(temperature=1.0), decoded(temperature=1.0, cache="none")
    assert not torch.equal(cached.trace.raw_log_prob, plain.trace.raw_log_prob)
    # Until the first sub-block has a token in its first slot nothing is left out.
    first = plain.trace.commit_step == 0
    assert torch.allclose(cached.trace.raw_log_prob[first], plain.trace.raw_log_prob[first], rtol=0, atol=1e-10)


@pytest.mark.parametrize("hints", [None, HINTS], ids=["free", "hinted"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"cfg_scale": 1.5}], ids=str)
def test_a_row_is_the_same_in_every_batch(settings: dict[str, Any], hints: Any):
    together = decoded(hints=hints, **settings)
    for row in range(len(PROMPTS)):
        assert_same_rows(decoded(hints=hints, rows=slice(row, row + 1), **settings), together, [row])


def test_what_is_fed():
    """The block before and the block; the block until its sub-block has begun; then the sub-block alone."""
    seen: list[Progress] = []
    row = next(i for i, prompt in enumerate(PROMPTS) if len(prompt) % BLOCK == 0)
    prompt = len(PROMPTS[row])
    denoiser = model(1)
    with watched(denoiser) as fed:
        rollout = decoded(rows=slice(row, row + 1), on_step=seen.append)
    widths, before = [], -prompt
    for state, progress in zip(rollout.states(), seen, strict=True):
        masked = (state[0] == denoiser.config.diffusion["mask_token_id"]).tolist()
        start, stop = int(progress.start), int(progress.stop)
        begin = start + (masked.index(True) - start) // SUB * SUB
        if before != start:
            widths.append(stop - before + (before >= 0))  # the column that predicts the first one is fed, too
        elif masked[begin] or all(masked[start + 1 : stop]):
            widths.append(stop - start + masked[start])
        else:
            widths.append(SUB)
        before = start
    assert [call["input_ids"].shape[1] for call in fed] == widths
    assert {SUB, BLOCK} <= set(widths)


def test_other_schedules_and_lengths_are_refused():
    with pytest.raises(ValueError, match="sub_block.*schedule='threshold'"):
        DecodingConfig(schedule="threshold", cache="sub_block")
    with pytest.raises(ValueError, match="sub_block_length=4.*schedule_args has 8"):
        DecodingConfig(schedule="sub_blocks", cache="sub_block", cache_args={"sub_block_length": 4})
    with pytest.raises(ValueError, match="sub_block_length=0"):
        DecodingConfig(schedule="sub_blocks", cache="sub_block", cache_args={"sub_block_length": 0})
