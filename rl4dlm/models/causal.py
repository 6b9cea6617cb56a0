"""Causal language models as judges of what a denoiser writes. They share its tokenizer and are never trained here.

Owns loading such a model, what it must have in common with the denoiser, and one forward over finished texts. What is
made of its judgement is a schedule's business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rl4dlm.models.adapters import base_model
from rl4dlm.models.scoring import check_head, reduce_hidden

Measure = Callable[[Tensor, Tensor], Tensor]
"""From logits `[c, V]` that predict tokens, and those tokens, long `[c]`, to something about each of them, `[c]`."""


def causal_model(source: Any) -> Any:
    """A causal language model in evaluation mode.

    Args:
        source: the model itself, or a path or hub id to load it from in the precision it is stored in. A loaded one is
            kept, so that each rollout need not load it again, until another is asked for.
    """
    model = _loaded(str(source)) if isinstance(source, str | Path) else source
    return model.eval() if model.training else model


@functools.lru_cache(maxsize=1)
def _loaded(source: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto")


def check_causal(causal: Any, denoiser: Any) -> None:
    """Whether a model can judge what a denoiser writes.

    Raises:
        ValueError: it is a denoiser itself, its vocabulary is not of the same size, as it is for models with one
            tokenizer, or its logits are not its head applied to its last hidden state.
    """
    base = base_model(causal)
    if getattr(base.config, "is_causal", True) is False or getattr(base.config, "diffusion", None) is not None:
        raise ValueError(f"{type(base).__name__} is a denoiser (its attention is not causal); a causal model is needed")
    sizes = [model.config.get_text_config().vocab_size for model in (causal, denoiser)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the causal model has {sizes[0]} tokens and the denoiser {sizes[1]}; they must share their tokenizer. If "
            f"they do and only the padding of the vocabulary differs, call resize_token_embeddings({sizes[1]}) on the "
            "causal model"
        )
    check_head(base)


@torch.no_grad()
def judge(causal: Any, prompts: Sequence[list[int]], canvas: Tensor, wanted: Tensor, measure: Measure) -> Tensor:
    """What a causal model makes of some tokens of prompts with completions, each given all that is left of it.

    One forward of all rows; logits are made for the wanted slots only, a chunk at a time.

    Args:
        causal: on any device; moved to the canvas's.
        prompts: R lists of token ids, none empty. canvas: long `[R, W]`.
        wanted: bool `[R, W]`. Everything left of a wanted slot must be written.

    Returns:
        `[R, W]`, what `measure` gives, 0 at other slots.

    Raises:
        ValueError: a text exceeds the positions of the model.
    """
    device, lengths = canvas.device, torch.tensor([len(prompt) for prompt in prompts], device=canvas.device)
    rows, slots = wanted.nonzero(as_tuple=True)
    columns = lengths[rows] + slots
    width = int(columns.max()) + 1 if len(columns) else 1
    limit = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and width > limit:
        raise ValueError(f"the causal model has {limit} positions, too few for a text of {width} tokens")
    # Padding is on the right, where a causal model never looks, so that it needs neither mask nor positions.
    texts = torch.zeros(len(prompts), int(lengths.max()) + canvas.shape[1], dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        texts[row, : len(prompt)] = torch.tensor(prompt, device=device)
        texts[row, len(prompt) : len(prompt) + canvas.shape[1]] = canvas[row]
    if causal.device != device:
        causal.to(device)
    base = base_model(causal)
    hidden = base.base_model(input_ids=texts[:, :width], use_cache=False).last_hidden_state  # [R, T, D]
    tokens = texts[rows, columns]  # [n]
    (values,) = reduce_hidden(
        base, hidden[rows, columns - 1], None, lambda logits, part: (measure(logits, tokens[part]),), 1.0, 0.0
    )
    result = torch.zeros(canvas.shape, dtype=values.dtype, device=device)
    result[rows, slots] = values
    return result


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """A measure: the log-probability of each token."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
