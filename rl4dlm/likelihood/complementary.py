"""Pairs of views that hide complementary tokens: every token is scored once in each pair (Dream-Coder, 2509.01142).

A pair has a level t ~ U(0, 1). Its first view hides each token with probability t, its second one exactly the others.
The score of a token is its log-probability where it is hidden, averaged over pairs. Unlike in coupled-GRPO there is
neither a view that hides everything nor a weight 1/t: the scores are no bound of a likelihood.

Also here: context-adaptive weights (CART), by which hidden tokens count that have visible neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, as_views, check_count, check_scope, in_scope
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class Complementary(Estimator):
    """Pairs of complementary views; prompts are never hidden.

    Args:
        pairs: number of pairs, each with a level of its own; there are 2 * pairs views.
        scope: `"valid"` tokens or the whole `"canvas"`.
        shared_by: rows whose ids are in the same run of so many have the same level and the same masks; runs start
            anew every `row_period` ids. None: every row has its own.
        row_period: see there.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    pairs: int = 1
    scope: str = "valid"
    shared_by: int | None = None
    row_period: int = 2**63 - 1

    reweighted = True  # not the log-likelihood of anything: a token is scored with random others visible

    def __post_init__(self) -> None:
        check_count("pairs", self.pairs)
        check_scope(self.scope)
        for name in ("shared_by", "row_period"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """2 * pairs views; the two of a pair are neighbours."""
        noise = RowNoise(self._keyed(rows), seed, iteration)
        level = noise.per_view("complementary level", self.pairs)  # [B, J]
        return self.views(rows, noise.per_token("complementary mask", self.pairs) < level[..., None])

    def _keyed(self, rows: Rows) -> Rows:
        """The same rows, where noise is shared with the id of the first one of their run."""
        if self.shared_by is None:
            return rows
        place = rows.row_ids % self.row_period
        return replace(rows, row_ids=rows.row_ids - place % self.shared_by)

    def views(self, rows: Rows, mask: Tensor) -> Views:
        """The views of given pairs: `mask`, bool `[B, J, L]`, hidden in the first one of each."""
        within = in_scope(rows, self.scope)[:, None]
        hidden = torch.stack([mask & within, ~mask & within], dim=2).flatten(1, 2)  # [B, 2 J, L]
        return as_views(rows, hidden, hidden.double() / self.pairs, self.scope)


def context_weights(visible: Tensor, p: float) -> Tensor:
    """Context-adaptive weights (CART): `sum over visible j != k of p (1 - p)^(|k - j| - 1) / 2`.

    A token with everything visible on both sides, without end, has weight 1; one without visible neighbours 0.

    Args:
        visible: bool `[..., T]`, real tokens that are not hidden.
        p: in (0, 1]; the larger, the nearer the neighbours that count. 1: those next to it only, with 1/2 each.

    Returns:
        float64 `[..., T]`, for every token, hidden or not.
    """
    position = torch.arange(visible.shape[-1], device=visible.device)
    distance = (position[:, None] - position).abs()
    kernel = torch.where(distance > 0, 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0).double(), 0.0)
    return visible.double() @ kernel


def check_context(name: str, p: float | None) -> None:
    """Refuses a `p` outside (0, 1]; None is off."""
    if p is not None and not 0 < p <= 1:
        raise ValueError(f"{name}={p} is not allowed; it must be in (0, 1], or None (all tokens count the same)")
