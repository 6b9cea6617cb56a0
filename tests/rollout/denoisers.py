"""Small random denoisers whose decisions are far from ties, and an independent view of what they predict."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.rollout import Rollout
from tests.models.float64 import exactly_float64

VOCAB, MASK, EOS = 24, 2, 1
PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 1, 13, 14, 15], [1, 1, 1]]
"""Prompts of different lengths; one holds the end-of-sequence token."""


@functools.cache
def denoiser(*, shift: int = 0, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama denoiser in float64 with top probabilities between 0.1 and 1; shared, so never change it."""
    model = tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.float64, seed=seed)
    model.config.diffusion["logit_shift"] = shift
    return attach_scoring(exactly_float64(model))


def row_logits(model: LlamaForCausalLM, prompt: list[int], state: Tensor, cfg_scale: float = 0.0) -> Tensor:
    """Logits `[L, V]` that predict a canvas `[L]`, from the model's own forward on this row alone, without padding."""
    mask, shift = model.config.diffusion["mask_token_id"], model.config.diffusion["logit_shift"]

    def forward(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*tokens, *state.tolist()]])).logits[0]
        return logits[len(tokens) - shift : len(tokens) + len(state) - shift]

    conditional = forward(prompt)
    if not cfg_scale:
        return conditional
    unconditional = forward([mask] * len(prompt))
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def sampling_distribution(logits: Tensor, mask: int, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Probabilities `[V]` that a token is drawn from, by the definition: without the mask token, tempered, filtered."""
    logits = logits.clone()
    logits[mask] = -torch.inf
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True, stable=True).tolist()
    if top_k:
        order = order[:top_k]
    kept, total = [], 0.0
    whole = sum(probabilities[token].item() for token in order)
    for token in order:
        kept.append(token)
        total += probabilities[token].item() / whole
        if total >= top_p:
            break
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def assert_same_rows(a: Rollout, b: Rollout, rows: list[int] | None = None) -> None:
    """Rows of `a` equal those of `b`: tokens, steps, forwards, and log-probabilities to 1e-10.

    `rows[i]` is the row of `b` that row i of `a` is compared with.
    """
    index = torch.tensor(range(len(b)) if rows is None else rows)
    assert a.prompt_ids == [b.prompt_ids[i] for i in index]
    assert a.row_ids == [b.row_ids[i] for i in index]
    assert a.stop_reason == [b.stop_reason[i] for i in index]
    for name in ("canvas", "valid", "hinted", "nfe"):
        assert torch.equal(getattr(a, name), getattr(b, name)[index]), name
    for name in ("commit_step", "steps"):
        assert torch.equal(getattr(a.trace, name), getattr(b.trace, name)[index]), name
    torch.testing.assert_close(a.trace.raw_log_prob, b.trace.raw_log_prob[index], rtol=0, atol=1e-10)
    assert (a.trace.log_prob is None) == (b.trace.log_prob is None)
    if a.trace.log_prob is not None:
        torch.testing.assert_close(a.trace.log_prob, b.trace.log_prob[index], rtol=0, atol=1e-10)
