"""What decoding settings do to the model's distribution at a slot, and which tokens may not be drawn there.

Owns the two rules; in what order they are applied, and what is drawn, is not decided here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig


def adjusted(logits: Tensor, config: DecodingConfig, eos_token_ids: tuple[int, ...], open_slots: Tensor) -> Tensor:
    """Logits `[n, V]` after the options that change the model's distribution.

    Args:
        logits: `[n, V]`, after guidance.
        config: whose `suppress_token_ids`, `eos_penalty` and `eos_penalty_decay` count.
        eos_token_ids: of the model.
        open_slots: long `[n]`, slots of the row of each that are not written yet.
    """
    if config.suppress_token_ids:
        ids = torch.tensor(config.suppress_token_ids, device=logits.device)
        logits = logits.index_fill(-1, ids, -torch.inf)
    if config.eos_penalty:
        penalty = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        penalty[list(eos_token_ids)] = config.eos_penalty
        share: Tensor | float = 1.0
        if config.eos_penalty_decay:
            share = open_slots[:, None].to(logits.dtype) / config.canvas_length
        logits = logits - share * penalty
    return logits


def banned(logits: Tensor, config: DecodingConfig, eos_token_ids: tuple[int, ...], positions: Tensor) -> Tensor | None:
    """bool `[n, V]`, tokens that may not be drawn at their slot besides the mask token; None if there are none.

    Args:
        logits: `[n, V]`. config: whose `min_new_tokens` and `known_tokens` count.
        eos_token_ids: of the model.
        positions: long `[n]`, canvas offsets.
    """
    found: Tensor | None = None
    if config.min_new_tokens and eos_token_ids:
        found = torch.zeros_like(logits, dtype=torch.bool)
        found[:, list(eos_token_ids)] = (positions < config.min_new_tokens)[:, None]
    if config.known_tokens is not None and config.known_tokens < logits.shape[-1]:
        unknown = torch.arange(logits.shape[-1], device=logits.device) >= config.known_tokens
        found = unknown.expand_as(logits) if found is None else found | unknown
    return found
