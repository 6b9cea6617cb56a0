"""From logits at masked positions to candidate tokens and what schedules need to know about them.

Owns the one reduction over the vocabulary that decoding does. Which candidates are committed is a schedule's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Drawn(NamedTuple):
    """Candidates, one entry per position."""

    token: Tensor  # long: the candidate, never the mask token
    confidence: Tensor  # its probability under the untempered softmax over the whole vocabulary
    raw_log_prob: Tensor  # the logarithm of that
    log_prob: Tensor  # its log-probability under the distribution really drawn from; 0 at temperature 0
    entropy: Tensor  # nats, of the untempered softmax


def draw_tokens(
    logits: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    mask_token_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    suppress: tuple[int, ...] = (),
) -> Drawn:
    """Draws one candidate per position.

    Args:
        logits: float32 or wider `[n, V]`, after guidance.
        choose: draws ids `[n]` from probabilities `[n, V]`; called at temperature > 0 only.
        mask_token_id: excluded from the draw alone; confidences keep the softmax over the whole vocabulary.
        temperature: 0 takes the most probable token, the lower id among equals.
        top_p: keeps the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keeps that many most probable tokens; 0 keeps all.
        suppress: token ids removed from the model's distribution altogether.

    Returns:
        `Drawn` with tensors `[n]`.
    """
    if suppress:
        logits = logits.index_fill(-1, torch.tensor(suppress, device=logits.device), -torch.inf)
    raw = logits.log_softmax(-1)
    probabilities = raw.exp()
    entropy = -torch.where(probabilities > 0, probabilities * raw, 0.0).sum(-1)
    allowed = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    if temperature == 0:
        token = lowest_argmax(allowed)
        log_prob = torch.zeros_like(entropy)
    else:
        sampling = _filter((allowed / temperature).log_softmax(-1), top_p, top_k)
        token = choose(sampling.exp())
        log_prob = sampling.gather(-1, token[:, None]).squeeze(-1)
    raw_log_prob = raw.gather(-1, token[:, None]).squeeze(-1)
    return Drawn(token, raw_log_prob.exp(), raw_log_prob, log_prob, entropy)


def lowest_argmax(logits: Tensor) -> Tensor:
    """argmax with ties broken by the lower id, which `torch.argmax` does not promise."""
    best = logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits >= best, ids, logits.shape[-1] - 1).amin(-1)


def _filter(log_probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities renormalised over the tokens that top-k and then top-p keep."""
    if (top_k <= 0 or top_k >= log_probs.shape[-1]) and top_p >= 1.0:
        return log_probs
    ordered, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    drop = (rank >= top_k).expand_as(ordered) if top_k > 0 else torch.zeros_like(ordered, dtype=torch.bool)
    if top_p < 1.0:
        kept = ordered.masked_fill(drop, -torch.inf).softmax(-1)
        drop = drop | (kept.cumsum(-1) - kept >= top_p)
    dropped = torch.zeros_like(drop).scatter(-1, ids, drop)
    return log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)
