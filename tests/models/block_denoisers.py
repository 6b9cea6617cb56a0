"""Small denoisers of every attention kind, and what they predict by the definition: block by block, without padding."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from tests.models.float64 import exactly_float64

VOCAB, MASK, EOS = 24, 2, 1
BLOCK, LENGTH = 4, 10
PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11, 12],
    [13, 14, 15, 16, 17, 18, 19, 20, 21],
    [3, 4, 5, 6, 7, 8, 9],
    [22, 5],
    [6, 7, 8, 9, 10, 11],
]
"""Lengths of 0, 1, b - 1 and 2 modulo the block; the canvas ends with a partial block or a whole one."""

KINDS = [
    (kind, origin)
    for kind in ("block_causal", "context_causal")
    for origin in ("position_zero", "response", "whole_prompt")
]


@functools.cache
def block_denoiser(
    kind: str, origin: str = "response", *, shift: int = 0, implementation: str = "sdpa", block_length: int = BLOCK
) -> LlamaForCausalLM:
    """A random Llama denoiser with top probabilities between 0.1 and 1; shared, so never change it."""
    model = tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    model.config.diffusion.update(attention=kind, grid_origin=origin, logit_shift=shift, mask_token_id=MASK)
    if kind in ("block_causal", "context_causal"):
        model.config.diffusion["block_length"] = block_length
    return attach_scoring(exactly_float64(model))


def block_of(spec: DiffusionSpec, prompt: int, position: int) -> int:
    """The block of a position, by the definition of the grid."""
    assert spec.block_length is not None
    if spec.grid_origin == "whole_prompt" and position < prompt:
        return -1
    return (position - (0 if spec.grid_origin == "position_zero" else prompt)) // spec.block_length


def sees(spec: DiffusionSpec, prompt: int, active: int, query: int, key: int) -> bool:
    """Whether one position sees another while block `active` is denoised, by the definition of the kinds."""
    if spec.attention == "full":
        return True
    if spec.attention == "causal" or (spec.attention == "context_causal" and block_of(spec, prompt, query) < active):
        return key <= query
    return block_of(spec, prompt, key) <= block_of(spec, prompt, query)


def logits_of(model: LlamaForCausalLM, prompt: int, tokens: list[int], active: int) -> Tensor:
    """Logits `[T, V]` that predict each token of one row, in one forward of the stock model under a spelt-out mask."""
    spec, size = DiffusionSpec.of(model), range(len(tokens))
    mask = torch.tensor([[sees(spec, prompt, active, q, k) for k in size] for q in size])
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -torch.inf)
    logits = model(input_ids=torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0]
    return logits if not spec.logit_shift else torch.cat([logits[:1], logits[:-1]])


def decoding_log_probs(
    model: LlamaForCausalLM, prompt: list[int], clean: list[int], noisy: list[int], cfg_scale: float = 0.0
) -> Tensor:
    """Log-probabilities `[L, V]`: each block of the canvas is predicted in a forward of its own, as decoding does it.

    The blocks before it are clean, it is noisy, and those behind it are not there.
    """
    spec, length, parts = DiffusionSpec.of(model), len(prompt), []
    blocks = [block_of(spec, length, length + offset) for offset in range(len(clean))]
    for block in sorted(set(blocks)):
        start, stop = blocks.index(block), len(blocks) - blocks[::-1].index(block)
        state = [*clean[:start], *noisy[start:stop]]
        logits = logits_of(model, length, [*prompt, *state], block)
        if cfg_scale:
            unconditional = logits_of(model, length, [*[MASK] * length, *state], block)
            logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
        parts.append(logits[length + start :])
    return torch.cat(parts).log_softmax(-1)
