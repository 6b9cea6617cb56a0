"""Denoisers of three tokens that are tables: one distribution per masked canvas and slot, and all there is to know.

Everything is enumerated in float64: orders, masks, completions.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.quadrature import gauss_legendre
from rl4dlm.likelihood.views import Rows, Views

TOKENS, MASK = 3, 3
PROMPT = 2


class Tabular:
    """log p(v at slot i | canvas), float64 `[4^L, L, 3]`; `logits` has gradients where they are asked for.

    Args:
        length: L.
        seed: of a random table: conditionals that need not fit together, as those of trained models.
        joint: `[3] * L`, a distribution over canvases; the table is then its conditionals.
    """

    def __init__(self, length: int, seed: int = 0, joint: Tensor | None = None) -> None:
        self.length = length
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn((TOKENS + 1) ** length, length, TOKENS, generator=generator, dtype=torch.float64) * 1.5
        if joint is not None:
            for n, canvas in enumerate(itertools.product(range(TOKENS + 1), repeat=length)):
                for i, v in itertools.product([i for i in range(length) if canvas[i] == MASK], range(TOKENS)):
                    seen = tuple(slice(None) if t == MASK else t for t in (*canvas[:i], v, *canvas[i + 1 :]))
                    logits[n, i, v] = joint[seen].sum().log()
        self.logits = logits

    def log_probs(self, y: Tensor, hidden: Tensor) -> Tensor:
        """Of the tokens of y, `[..., L]`, where `hidden` (bool `[..., L]`) says what is masked. They broadcast."""
        y, hidden = torch.broadcast_tensors(y, hidden)
        canvas = torch.where(hidden, MASK, y)
        index = (canvas * (TOKENS + 1) ** torch.arange(self.length).flip(0)).sum(-1)
        return self.logits[index].log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)

    def scores(self, estimator: Estimator, views: Views, y: Tensor) -> Tensor:
        """`[B, L]` of completions y, `[B, L]`; log-probabilities are there only where they are scored."""
        return estimator.reduce(self.view_log_probs(views, y), views)

    def view_log_probs(self, views: Views, y: Tensor) -> Tensor:
        """`[B, K, L]`."""
        return self.log_probs(y[:, None], views.hidden[..., -self.length :]) * views.scored

    def by_orders(self, y: Tensor, valid: int | None = None) -> Tensor:
        """Sums of log-probabilities `[orders]` of writing the valid tokens of y (`[L]`) in every order."""
        valid = self.length if valid is None else valid
        return torch.stack([self.steps(y, order).sum() for order in itertools.permutations(range(valid))])

    def steps(self, y: Tensor, order: tuple[int, ...]) -> Tensor:
        """Log-probabilities `[L]` of the tokens of y written in an order, zero for those that are not in it."""
        place = torch.full((self.length,), self.length)
        place[list(order)] = torch.arange(len(order))
        hidden = place >= torch.arange(len(order))[:, None]  # [steps, L]
        each = self.log_probs(y, hidden)
        return (each * (place == torch.arange(len(order))[:, None])).sum(0)

    def elbo(self, y: Tensor, valid: int | None = None) -> float:
        return float(self.by_orders(y, valid).mean())

    def log_likelihood(self, y: Tensor) -> float:
        """Exact, of writing in uniformly random order."""
        orders = self.by_orders(y)
        return float(orders.logsumexp(0)) - math.log(len(orders))


def joint(length: int, seed: int) -> Tensor:
    """A random distribution over canvases, `[3] * length`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*[TOKENS] * length, generator=generator, dtype=torch.float64) ** 2 + 0.05
    return weights / weights.sum()


def completions(length: int) -> Tensor:
    """All of them, long `[3^L, L]`."""
    return torch.tensor(list(itertools.product(range(TOKENS), repeat=length)))


def all_masks(length: int) -> Tensor:
    """bool `[2^L, L]`."""
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def rows_of(y: Tensor, count: int = 1, valid: int | None = None, first_id: int = 0) -> Rows:
    """`count` rows of one completion `[L]`, after a prompt of two tokens."""
    real = torch.arange(len(y)) < (len(y) if valid is None else valid)
    prompt = torch.ones(count, PROMPT, dtype=torch.long)
    ids = torch.arange(first_id, first_id + count)
    return Rows(prompt, prompt, y.expand(count, -1), real.expand(count, -1), ids)


def iid_masks(length: int, nodes: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Masks `[N, L]`, levels `[N]` and probabilities `[N]` of t ~ U(0, 1) and each token hidden with probability t.

    The integral over t is a sum over nodes, exact since what is integrated are polynomials.
    """
    levels, weights = gauss_legendre(nodes)
    masks = all_masks(length)
    count = masks.sum(-1)
    probability = levels[:, None] ** count * (1 - levels[:, None]) ** (length - count) * weights[:, None]  # [N, 2^L]
    return masks.repeat(nodes, 1), levels.repeat_interleave(len(masks)), probability.flatten()


def count_masks(length: int, least: int) -> tuple[Tensor, Tensor]:
    """Masks `[N, L]` and probabilities `[N]` of a uniform count on least..length and a uniform subset."""
    masks = all_masks(length)
    masks = masks[masks.sum(-1) >= least]
    subsets = torch.tensor([math.comb(length, int(k)) for k in masks.sum(-1)], dtype=torch.float64)
    return masks, 1 / (subsets * (length + 1 - least))


def mask_counts(mask: Tensor) -> Tensor:
    """How often each mask (bool `[N, L]`) is there, `[2^L]`, in the order of `all_masks`."""
    length = mask.shape[-1]
    return (mask * 2 ** torch.arange(length).flip(0)).sum(-1).bincount(minlength=2**length)
