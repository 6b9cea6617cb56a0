"""A denoiser whose rows end at different lengths, prompts of different length, and settings to decode them with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import LlamaForCausalLM

from rl4dlm.models.tiny import tiny_llada
from tests.models.float64 import exactly_float64

LENGTH, BLOCK, EOS = 12, 4, 1


def model() -> LlamaForCausalLM:
    """A random Llama denoiser in float64 that likes to end."""
    found = exactly_float64(tiny_llada(vocab_size=24, initializer_range=0.4, dtype=torch.float64))
    with torch.no_grad():
        found.lm_head.weight[EOS] *= 1.5
    return found


@functools.cache
def prompts() -> list[list[int]]:
    """Eight prompts of 1 to 40 tokens."""
    return [[3 + (row + i) % 20 for i in range(1 + (17 * row) % 41)] for row in range(8)]


def settings(**changes: Any) -> dict[str, Any]:
    return {"canvas_length": LENGTH, "block_length": BLOCK, "temperature": 1.0, **changes}


RUNS = [
    settings(**{"steps": 12, "cache": cache, "cfg_scale": guidance, **more})
    for guidance in (0.0, 1.0)
    for cache in ("none", "prefix", "dual", "dual_masked", "auto")
    for more in ({}, {"steps": None, "schedule": "threshold", "schedule_args": {"threshold": 0.5}})
]
"""Twenty decodings."""

BLOCKS = {"canvas_length": LENGTH, "temperature": 1.0, "schedule": "threshold", "schedule_args": {"threshold": 0.4}}
"""One of a model with attention blocks."""
