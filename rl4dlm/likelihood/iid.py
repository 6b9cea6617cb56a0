"""The estimator of UniGRPO (MMaDA, arXiv 2505.15809, section 4.3): canvas tokens hidden independently at a level.

Each inner iteration has a level; a token is hidden with that probability, and scored where it is hidden. The levels of
a row are structured over the iterations n = 0 .. mu - 1 of a batch: a random start, then even steps up to a canvas that
is hidden as a whole, in a discretisation of T steps,

    t_0 = floor(r T) for r ~ U(0, 1),    t_n = floor(n (T - t_0) / (mu - 1)) + t_0,    level t_n / T.

The example in the paper's text (100, 300, 500, 700, 900) follows another rule; this is the paper's formula. With
`levels="uniform"` every iteration and view draws a level of its own, as the random masking of the authors' later
framework does (arXiv 2509.06949).

With weight `"one"` the score of a hidden token is its log-probability; the loss is then averaged over the hidden tokens
of a sequence. With weight `"level"` it counts 1/t: uniform levels on (0, 1) then give the evidence lower bound without
bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import (
    RowNoise,
    as_views,
    check_choice,
    check_count,
    check_range,
    check_scope,
    in_scope,
)
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class IIDRatio(Estimator):
    """Views that hide canvas tokens independently of each other; prompts are never hidden.

    Args:
        num_iterations: mu, inner iterations over which structured levels rise.
        levels: `"structured"` or `"uniform"`.
        level_range: of the start r, or of uniform levels.
        num_steps: T.
        num_views: K, views per iteration; structured ones have a start each.
        weight: what a hidden token counts for, over K: `"one"`, or one over its `"level"`.
        scope: `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_iterations: int = 1
    levels: str = "structured"
    level_range: tuple[float, float] = (0.0, 1.0)
    num_steps: int = 1000
    num_views: int = 1
    weight: str = "one"
    scope: str = "valid"

    shares_masks = True  # levels and masks of tokens at the same places

    def __post_init__(self) -> None:
        for name in ("num_iterations", "num_steps", "num_views"):
            check_count(name, getattr(self, name))
        check_choice("levels", self.levels, ("structured", "uniform"))
        check_choice("weight", self.weight, ("one", "level"))
        check_range("level_range", self.level_range)
        check_scope(self.scope)

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """True with weight `"one"`: a token counts for how often it is hidden."""
        return self.weight == "one"

    def level(self, start: Tensor, iteration: int) -> Tensor:
        """The structured level t_n / T of an iteration n, from the start r in [0, 1)."""
        first = (start * self.num_steps).floor()
        rise, last = min(iteration, self.num_iterations - 1), max(self.num_iterations - 1, 1)
        return ((rise * (self.num_steps - first) / last).floor() + first) / self.num_steps

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views."""
        low, high = self.level_range
        # The start of structured levels is that of all iterations, so it is keyed without one.
        levels = RowNoise(rows, seed, 0 if self.levels == "structured" else iteration)
        level = low + (high - low) * levels.per_view("iid level", self.num_views)  # [B, K]
        if self.levels == "structured":
            level = self.level(level, iteration)
        uniform = RowNoise(rows, seed, iteration).per_token("iid mask", self.num_views)
        return self.views(rows, uniform < level[..., None], level)

    def views(self, rows: Rows, mask: Tensor, level: Tensor) -> Views:
        """The views of given masks, bool `[B, K, L]`, and levels, `[B, K]`."""
        mask = mask & in_scope(rows, self.scope)[:, None]
        each = torch.ones_like(level, dtype=torch.float64) if self.weight == "one" else 1 / level.double()
        weight = torch.where(mask, each[..., None] / mask.shape[1], 0.0)
        return as_views(rows, mask, weight, self.scope)
