"""The coupled estimator of coupled-GRPO (DiffuCoder, arXiv 2506.20639, section 4).

One view hides the whole canvas. For each of lambda pairs, with a level m, two more hide a random set of tokens, each
token with probability m, and exactly the others. The score of a token is

    1 / (lambda + 1) * (log p in the first view + sum over pairs of log p / m, or log p / (1 - m) where the
    second one of the pair hides it),

so that every token is scored once in every pair, and the two views of a pair are antithetic. It is a score, no
log-probability: its weights add up to (2 lambda + 1) / (lambda + 1) on average, 1.5 for one pair. Clip range and KL
coefficient of the paper are made for that scale.

Decided differently from the released code: the level is drawn per row instead of once for the batch, micro-batches do
not share masks, a token is always in one of the two sets (strict comparisons on both sides leave out ties), and tokens
behind the end are hidden unless the scope is the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, as_views, check_count, check_range, check_scope, in_scope
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class Coupled(Estimator):
    """The whole canvas hidden, and pairs of views that hide complementary tokens.

    Args:
        pairs: lambda; 0 is the mean field without prompt masking. There are 1 + 2 * pairs views.
        level_range: m is uniform in it.
        scope: `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    pairs: int = 1
    level_range: tuple[float, float] = (0.2, 0.8)
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_count("pairs", self.pairs, least=0)
        check_range("level_range", self.level_range)
        if not 0 < self.level_range[0] <= self.level_range[1] < 1:
            raise ValueError(f"level_range={self.level_range!r} is not allowed; both views of a pair need a level > 0")
        check_scope(self.scope)

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        """Whether anything is random."""
        return self.pairs > 0

    @property
    def shares_masks(self) -> bool:  # type: ignore[override]
        """Whether there are masks, of tokens at the same places of all completions of a prompt."""
        return self.pairs > 0

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """True with pairs: weights add up to more than 1."""
        return self.pairs > 0

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """1 + 2 * pairs views."""
        noise, (low, high) = RowNoise(rows, seed, iteration), self.level_range
        level = low + (high - low) * noise.per_view("coupled level", self.pairs)  # [B, J]
        mask = noise.per_token("coupled mask", self.pairs) < level[..., None]  # [B, J, L]
        return self.views(rows, mask, level)

    def views(self, rows: Rows, mask: Tensor, level: Tensor) -> Views:
        """The views of given pairs: `mask`, bool `[B, J, L]`, hidden in the first one; `level`, m, `[B, J]`."""
        within = in_scope(rows, self.scope)[:, None]
        first, second = mask & within, ~mask & within
        level = level.double()[..., None]
        pairs = torch.stack([first, second], dim=2).flatten(1, 2)  # [B, 2 J, L]
        weights = torch.stack([first / level, second / (1 - level)], dim=2).flatten(1, 2)
        hidden = torch.cat([within, pairs], dim=1)
        weight = torch.cat([within.double(), weights], dim=1) / (self.pairs + 1)
        return as_views(rows, hidden, weight, self.scope)
