"""What is kept of logits: log-probabilities of tokens and entropies, as one node of the graph.

Owns the default reduction and what a reduction is. Where logits come from is `scoring.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduction = Callable[..., tuple[Tensor, ...]]
"""Maps logits `[c, V]` of some scored positions, and which slice of all of them they are, to tensors `[c, ...]`."""


class TokenScores(NamedTuple):
    """What the default reduction returns, one entry per scored position in row-major order."""

    log_probs: Tensor  # [n]
    entropies: Tensor  # [n], in nats


class ValuedScores(NamedTuple):
    """The same, with what a value head makes of the states that tokens are predicted from."""

    log_probs: Tensor  # [n]
    entropies: Tensor  # [n], in nats
    values: Tensor  # [n]


def log_prob_reduction(targets: Tensor, states: Tensor | None = None) -> Reduction:
    """Log-probabilities of targets, and the entropies of what they are predicted from.

    Args:
        targets: long `[n]`.
        states: long `[n]`, rising: by which of the reduced states each target is scored, so that one state may score
            several targets. None: each by its own.
    """

    def reduce(logits: Tensor, part: slice) -> TokenScores:
        if states is None:
            return TokenScores(*_LogProbsAndEntropies.apply(logits, targets[part], None))
        ends = torch.tensor([part.start, part.stop], device=states.device)
        chosen = slice(*torch.searchsorted(states, ends).tolist())
        return TokenScores(*_LogProbsAndEntropies.apply(logits, targets[chosen], states[chosen] - part.start))

    return reduce


class _LogProbsAndEntropies(torch.autograd.Function):
    """Log-probabilities of targets `[n]` and entropies `[c]` from logits `[c, V]`, as one node of the graph.

    Target i is scored by row `rows[i]` of the logits; without `rows` n is c and each row scores one.

    Of two nodes, that of the entropies has no gradient in most losses. It would never run, and hold what checkpointing
    computes again for it until the whole backward pass is over: logits of all chunks and views at once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        ctx.save_for_backward(log_probs, targets, entropies, rows)
        if rows is None:
            return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropies
        return log_probs[rows, targets], entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, targets, entropies, rows = ctx.saved_tensors
        if of_log_probs is None and of_entropies is None:
            return None, None, None
        summed = of_log_probs  # [c]
        if rows is not None and of_log_probs is not None:
            summed = torch.zeros_like(entropies).index_put_((rows,), of_log_probs, accumulate=True)
        gradient: Tensor = log_probs.exp()  # [c, V]
        if of_entropies is not None:
            slope = -of_entropies[:, None] * (log_probs + entropies[:, None])
            gradient.mul_(slope if summed is None else slope.sub_(summed[:, None]))
        elif summed is not None:
            gradient.mul_(-summed[:, None])
        if of_log_probs is not None and rows is None:
            gradient.scatter_add_(-1, targets[:, None], of_log_probs[:, None])
        elif of_log_probs is not None:
            gradient.index_put_((rows, targets), of_log_probs, accumulate=True)
        return gradient, None, None
