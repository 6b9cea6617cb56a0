"""What is kept of logits: log-probabilities of tokens and entropies, as one node of the graph.

Owns the default reduction and what a reduction is. Where logits come from is `scoring.py`'s; what is kept of whole
distributions `distributions.py`'s.
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


class ChosenScores(NamedTuple):
    """The same, with what an unmasking policy makes of the choice of each token's slot."""

    log_probs: Tensor  # [n]
    entropies: Tensor  # [n], in nats
    choices: Tensor  # [n], log-probabilities


SCORES = ("log_prob", "centred_logit")
"""What a target's score may be: its log-probability, or its logit minus the mean of all logits there (GDSD-TLC)."""


def log_prob_reduction(targets: Tensor, states: Tensor | None = None, of: str = "log_prob") -> Reduction:
    """Scores of targets, and the entropies of what they are predicted from.

    Args:
        targets: long `[n]`.
        states: long `[n]`, rising: by which of the reduced states each target is scored, so that one state may score
            several targets. None: each by its own.
        of: one of `SCORES`. Centred logits have a gradient by all logits of a position, which adds up to zero.
    """
    if of not in SCORES:
        raise ValueError(f"score_of={of!r} is not allowed; choose one of {', '.join(SCORES)}")
    centred = of == "centred_logit"

    def reduce(logits: Tensor, part: slice) -> TokenScores:
        if states is None:
            return TokenScores(*_LogProbsAndEntropies.apply(logits, targets[part], None, centred))
        ends = torch.tensor([part.start, part.stop], device=states.device)
        chosen = slice(*torch.searchsorted(states, ends).tolist())
        rows = states[chosen] - part.start
        return TokenScores(*_LogProbsAndEntropies.apply(logits, targets[chosen], rows, centred))

    return reduce


class _LogProbsAndEntropies(torch.autograd.Function):
    """Scores of targets `[n]` and entropies `[c]` from logits `[c, V]`, as one node of the graph.

    Target i is scored by row `rows[i]` of the logits; without `rows` n is c and each row scores one. Scores are
    log-probabilities, or logits above their mean where they are `centred`.

    Of two nodes, that of the entropies has no gradient in most losses. It would never run, and hold what checkpointing
    computes again for it until the whole backward pass is over: logits of all chunks and views at once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor | None, centred: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.centred = centred
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        ctx.save_for_backward(log_probs, targets, entropies, rows)
        scores = logits - logits.mean(-1, keepdim=True) if centred else log_probs
        if rows is None:
            return scores.gather(-1, targets[:, None]).squeeze(-1), entropies
        return scores[rows, targets], entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scores: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, targets, entropies, rows = ctx.saved_tensors
        if of_scores is None and of_entropies is None:
            return None, None, None, None
        summed = of_scores  # [c]
        if rows is not None and of_scores is not None:
            summed = torch.zeros_like(entropies).index_put_((rows,), of_scores, accumulate=True)
        # Of a score by all logits: minus their probabilities, or minus an even share of each.
        even = 1 / log_probs.shape[-1] if ctx.centred else None
        gradient: Tensor = log_probs.exp()  # [c, V]
        if of_entropies is not None:
            slope = -of_entropies[:, None] * (log_probs + entropies[:, None])
            gradient.mul_(slope if summed is None or ctx.centred else slope.sub_(summed[:, None]))
            if summed is not None and even is not None:
                gradient.sub_(even * summed[:, None])
        elif summed is not None:
            gradient = (
                (-even * summed[:, None]).repeat(1, len(gradient[0])) if even else gradient.mul_(-summed[:, None])
            )
        if of_scores is not None and rows is None:
            gradient.scatter_add_(-1, targets[:, None], of_scores[:, None])
        elif of_scores is not None:
            gradient.index_put_((rows, targets), of_scores, accumulate=True)
        return gradient, None, None, None
