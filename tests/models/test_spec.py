"""The spec survives its dictionary, and refuses what it cannot mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from transformers import LlamaConfig

from rl4dlm.models.spec import ATTENTION_KINDS, GRID_ORIGINS, NOISE_KINDS, DiffusionSpec
from rl4dlm.models.tiny import tiny_llada

specs = st.builds(
    DiffusionSpec,
    mask_token_id=st.integers(100, 200),
    eos_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    logit_shift=st.sampled_from([0, 1]),
    attention=st.sampled_from(ATTENTION_KINDS),
    block_length=st.none() | st.integers(1, 64),
    grid_origin=st.sampled_from(GRID_ORIGINS),
    noise=st.sampled_from(NOISE_KINDS),
)


@given(spec=specs)
def test_it_survives_json(spec: DiffusionSpec):
    again = DiffusionSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)


@given(spec=specs)
def test_it_survives_a_configuration(spec: DiffusionSpec):
    config = LlamaConfig(diffusion=spec.to_dict())
    assert DiffusionSpec.of(LlamaConfig(**json.loads(config.to_json_string()))) == spec


def test_it_is_read_from_a_model_or_its_configuration():
    model = tiny_llada(mask_token_id=7, eos_token_id=3)
    assert DiffusionSpec.of(model) == DiffusionSpec.of(model.config) == DiffusionSpec(7, (3,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": -1}, "mask_token_id=-1"),
        ({"eos_token_ids": (1, 9)}, r"mask_token_id=9 is also in eos_token_ids=\(1, 9\)"),
        ({"eos_token_ids": 1}, "eos_token_ids=1"),
        ({"logit_shift": 2}, "logit_shift=2.*0 or 1"),
        ({"attention": "sparse"}, "attention='sparse'.*full, block_causal"),
        ({"grid_origin": "prompt"}, "grid_origin='prompt'.*response, position_zero"),
        ({"noise": "gaussian"}, "noise='gaussian'.*mask, uniform"),
        ({"block_length": 0}, "block_length=0.*1 or larger"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DiffusionSpec(**{"mask_token_id": 9, "eos_token_ids": (1,), **changes})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_token_id": 9}, r"lacks \['eos_token_ids'\]"),
        ({"eos_token_ids": [1]}, r"lacks \['mask_token_id'\]"),
        ({"mask_token_id": 9, "eos_token_ids": [1], "mask_id": 9}, r"unknown keys \['mask_id'\].*logit_shift"),
    ],
)
def test_a_bad_dictionary_is_named(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DiffusionSpec.from_dict(values)


def test_a_model_without_one_says_what_to_do():
    with pytest.raises(ValueError, match="LlamaConfig has no `config.diffusion`.*DiffusionSpec"):
        DiffusionSpec.of(LlamaConfig())
