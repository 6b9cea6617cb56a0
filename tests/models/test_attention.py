"""Masks in the form that each attention implementation understands."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.models.attention import attention_mask, check_attention, position_ids
from rl4dlm.models.spec import DiffusionSpec

KEYS = torch.tensor([[False, False, True, True], [True, True, True, True]])


def test_positions_count_from_the_first_real_token():
    assert position_ids(KEYS).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention", "flash_attention_2", None])
def test_nothing_to_hide_needs_no_mask(implementation: str | None):
    assert attention_mask(torch.ones(2, 4).bool(), 4, implementation, torch.float32) is None


@pytest.mark.parametrize("queries", [4, 2])
def test_every_query_sees_every_real_key(queries: int):
    expected = KEYS[:, None, None, :].expand(2, 1, queries, 4)
    bools = attention_mask(KEYS, queries, "sdpa", torch.float32)
    assert bools.dtype == torch.bool and torch.equal(bools, expected)
    assert torch.equal(attention_mask(KEYS, queries, None, torch.float32), expected)
    added = attention_mask(KEYS, queries, "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, expected) and bool((added[~expected] == torch.finfo(torch.bfloat16).min).all())
    assert torch.equal(torch.zeros(2, 1, queries, 4, dtype=added.dtype).add(added).softmax(-1) > 0, expected)


def test_flash_attention_cannot_hide_padding():
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*sdpa or flex_attention"):
        attention_mask(KEYS, 4, "flash_attention_2", torch.float32)


def test_what_cannot_run_is_named():
    check_attention(DiffusionSpec(1, (0,)), "flash_attention_2")
    check_attention(DiffusionSpec(1, (0,), attention="causal"), "sdpa")
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' cannot run attention='causal'"):
        check_attention(DiffusionSpec(1, (0,), attention="causal"), "flash_attention_2")
    with pytest.raises(ValueError, match="attention='block_causal' needs the length of its blocks.*block_length=None"):
        check_attention(DiffusionSpec(1, (0,), attention="block_causal"), "sdpa")
    with pytest.raises(ValueError, match="attn_implementation='paged'.*sdpa, eager"):
        check_attention(DiffusionSpec(1, (0,)), "paged")
