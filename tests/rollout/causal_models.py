"""Causal language models that judge denoisers in tests: a random Llama, and one whose logits are written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.float64 import exactly_float64
from tests.rollout.table_model import TableModel


def stock_causal(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A random stock Llama."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@functools.cache
def random_causal(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """The same in float64; shared, so never change it."""
    return exactly_float64(stock_causal(vocab_size, seed).to(torch.float64))


def table_causal(next_logits: Callable[[tuple[int, ...]], Tensor], vocab_size: int) -> Any:
    """A causal model from a function of the tokens so far to the logits `[V]` of the next one."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        return torch.stack([next_logits(tokens[: i + 1]) for i in range(len(tokens))])

    model = TableModel(table, vocab_size, mask_token_id=vocab_size - 1)
    model.config.diffusion = None
    return model
