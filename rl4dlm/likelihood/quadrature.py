"""The evidence lower bound by quadrature over levels (semi-deterministic Monte Carlo, GDPO, arXiv 2510.08554).

The bound is an integral over levels t in (0, 1) of

    g(t) = E_{each token hidden with probability t} (1/t) sum of log p over hidden tokens.

Most of the variance of a Monte Carlo estimate comes from t. So t takes the N nodes of a Gauss-Legendre rule, with
weights w_n, and each node gets K masks:

    sum_n w_n / K * sum_k (1 / t_n) * sum of log p over the tokens hidden in the k-th mask of node n.

g is a polynomial of degree |y| - 1: with independent tokens (`masks="bernoulli"`) the expectation is the bound itself
where 2 N - 1 >= |y| - 1, and close to it for few nodes. With exact counts, max(1, floor(t_n |y|)) tokens per mask, it
is so for no N; weight `"level"` then also scales the estimate (by 0.992 for 256 tokens and 3 nodes, by 1.33 for 3
tokens), weight `"count"`, |y| over the number of hidden tokens in place of 1/t, does not.

Decided differently from the released code: the defaults are the exact rule instead of exact counts with 1/t; the three
points that it calls Simpson's, which are not, are left out; masks are keyed by row and iteration instead of by the
tokens, which gives equal completions equal masks in all iterations; tokens behind the end are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, as_views, check_choice, check_count, check_scope, in_scope, subset
from rl4dlm.likelihood.views import Rows, Views


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1), rising, and weights that add up to 1, float64: exact for polynomials of degree 2 * nodes - 1."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


@dataclass(frozen=True)
class Quadrature(Estimator):
    """N * K views at fixed levels; the sum of the scores is an estimate of the bound. Prompts are never hidden.

    Args:
        nodes: N.
        masks_per_node: K.
        masks: `"bernoulli"`, tokens hidden independently, or `"count"`, a fixed number of them.
        weight: `"level"`, w_n / (K t_n), or `"count"`, w_n |y| / (K k_n), which needs a fixed number.
        scope: `"valid"` tokens or the whole `"canvas"`; |y| counts them.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    nodes: int = 3
    masks_per_node: int = 1
    masks: str = "bernoulli"
    weight: str = "level"
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes)
        check_count("masks_per_node", self.masks_per_node)
        check_choice("masks", self.masks, ("bernoulli", "count"))
        check_choice("weight", self.weight, ("level", "count"))
        if (self.masks, self.weight) == ("bernoulli", "count"):
            raise ValueError("weight='count' is not allowed with masks='bernoulli', whose counts vary; choose level")
        check_scope(self.scope)

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """True for exact counts weighted by level."""
        return (self.masks, self.weight) == ("count", "level")

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """N * K views, those of a node next to each other."""
        uniform = RowNoise(rows, seed, iteration).per_token("quadrature mask", self.nodes * self.masks_per_node)
        level = self._levels(uniform)[0]
        if self.masks == "bernoulli":
            return self.views(rows, uniform < level[:, None])
        within = in_scope(rows, self.scope)[:, None]
        count = (level * within.sum(-1)).long().clamp(min=1)  # [B, N K]
        return self.views(rows, subset(uniform, within, count[..., None]))

    def views(self, rows: Rows, mask: Tensor) -> Views:
        """The views of given masks, bool `[B, N * K, L]`."""
        within = in_scope(rows, self.scope)[:, None]
        mask = mask & within
        level, share = (x[:, None] for x in self._levels(mask))  # [N K, 1]
        if self.weight == "level":
            each = 1 / level
        else:
            each = within.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).double()
        return as_views(rows, mask, torch.where(mask, share * each, 0.0), self.scope)

    def _levels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Level and w_n / K of every view, float64 `[N * K]`."""
        level, weight = (x.to(like.device).repeat_interleave(self.masks_per_node) for x in gauss_legendre(self.nodes))
        return level, weight / self.masks_per_node
