"""The evidence lower bound of a masked denoiser, by Monte Carlo (ESPO, BGPO, DMPO, VRPO).

Write the n tokens of y in a uniformly random order, one at a time. With Jensen's inequality over orders,

    log p(y) >= ELBO(y) = E_order sum_i log p(y_i | the tokens before i in the order),

and three expectations over masks M are equal to it, `log p_i` being given what M does not hide:

    bernoulli         E_{t ~ U(0, 1), each token in M with probability t}  (1/t) sum_{i in M} log p_i
    count             E_{l ~ U{1..n}, |M| = l}                             (n/l) sum_{i in M} log p_i
    count_with_zero   E_{k ~ U{0..n}, |M| = k}                             ((n+1)/k) sum_{i in M} log p_i

The first two are LLaDA's (arXiv 2502.09992, equations 3 and 14), the third is ESPO's (arXiv 2512.03759). A fixed count
varies less than independent tokens. `bernoulli_count` is DMPO's (arXiv 2510.08233): independent tokens, but each view
counts n / |M|; for levels on (0, 1) it is n / (n + 1) times the bound, for others it is biased.

Complements (antithetic pairs): the second view of a pair hides exactly the tokens that the first one shows, with
the weight of its own level or count; pairs are averaged, and each scores every token once. This keeps the expectation.
With `count`, l is n as often as anything else, and nothing is left for the second view: it then hides everything, too,
as often as its count would be n without the first one. All weights of a `count` pair add up to n, where those of a
`count_with_zero` pair are (n + 1) / 2 or n + 1: the noise of that, 1/2 sqrt(2 / (n + 1)) of the bound for a pair, is
gone. It cancels in ratios on policy, not in exponents of weights, gaps or reported bounds.

Blocks: a model that scores each block given finished ones before it has the bound sum_b ELBO(y_b | y_{<b}). Counts over
the whole canvas are unbiased for it as they are: the weighted measure over masks is that of (1/t) and independent
tokens, whose marginal on a block is the block's own. `per_block` draws a count for each block, each view then hides
something of every block, and n is the block's: the same expectation, with less variance (LLaDA2.1, arXiv 2602.08676).

Levels may be stratified over the views of a row and over rows; each is still uniform by itself, so nothing is biased.
Those of the blocks of a view are a golden ratio apart.
Rows are spread by their ids, not by their place in a batch as in ESPO's code, whose rounding to even numbers leaves out
counts. Tokens behind the end are hidden in scope `"valid"`, and n counts valid tokens; ESPO's and DMPO's code noises
and scores the whole canvas.

With levels from a part of (0, 1) the estimate is of an average over those levels, not of the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import (
    STRATIFY,
    RowNoise,
    as_views,
    blocks_of,
    check_choice,
    check_count,
    check_range,
    check_scope,
    count_of,
    in_scope,
    of_blocks,
    subset,
    subset_of_blocks,
)
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.spec import GRID_ORIGINS

FORMS = ("bernoulli", "count", "count_with_zero", "bernoulli_count")


@dataclass(frozen=True)
class ELBO(Estimator):
    """K views at random levels; the sum of the scores is an estimate of the bound. Prompts are never hidden.

    Args:
        num_views: K; even with complements.
        form: how tokens are hidden and weighted, see above.
        complement: views come in pairs that hide complementary tokens.
        stratify: `"none"`; levels spread over the `"views"` of a row; or over `"rows"`, too.
        level_range: where levels come from; DMPO has (0.1, 1).
        scope: `"valid"` tokens or the whole `"canvas"`.
        per_block: draw a count for each block; for the forms with counts.
        block_length, block_origin: of the blocks, those of the model's attention; see `DiffusionSpec`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_views: int = 4
    form: str = "count"
    complement: bool = False
    stratify: str = "views"
    level_range: tuple[float, float] = (0.0, 1.0)
    scope: str = "valid"
    per_block: bool = False
    block_length: int | None = None
    block_origin: str = "response"

    def __post_init__(self) -> None:
        check_count("num_views", self.num_views)
        check_choice("form", self.form, FORMS)
        check_choice("stratify", self.stratify, STRATIFY)
        check_range("level_range", self.level_range)
        check_scope(self.scope)
        if self.complement and self.num_views % 2:
            raise ValueError(f"num_views={self.num_views} is not allowed with complement=True; it must be even")
        check_choice("block_origin", self.block_origin, GRID_ORIGINS)
        if self.per_block and self.form not in ("count", "count_with_zero"):
            raise ValueError(f"per_block=True is not allowed with form={self.form!r}; choose count or count_with_zero")
        if self.per_block or self.block_length is not None:
            check_count("block_length", self.block_length)  # type: ignore[arg-type]
        if not self.per_block and (self.block_length is not None or self.block_origin != "response"):
            raise ValueError(
                f"block_length={self.block_length} and block_origin={self.block_origin!r} have no effect with "
                "per_block=False; leave them out"
            )

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """Whether the expected weight of a token is not 1."""
        whole = tuple(self.level_range) == (0.0, 1.0)
        return self.form == "bernoulli_count" or (not whole and self.form != "bernoulli")

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views; with complements, those of a pair follow each other."""
        noise, (low, high) = RowNoise(rows, seed, iteration), self.level_range
        draws = self.num_views // 2 if self.complement else self.num_views
        uniform = noise.per_token("elbo mask", draws)  # [B, J, L]
        within, least = in_scope(rows, self.scope), 0 if self.form == "count_with_zero" else 1
        if self.per_block:
            block, blocks = self._blocks(rows)
            spread = noise.spread_in_blocks("elbo level", draws, blocks, self.stratify)  # [B, J, N]
            count = count_of(low + (high - low) * spread, least, of_blocks(within, block, blocks)[:, None])
            return self.views(rows, subset_of_blocks(uniform, within, block, count), spread[..., 0])
        level = low + (high - low) * noise.spread("elbo level", draws, self.stratify)  # [B, J]
        if self.form in ("bernoulli", "bernoulli_count"):
            return self.views(rows, uniform < level[..., None], level)
        count = count_of(level, least, within.sum(-1, keepdim=True))  # [B, J]
        return self.views(rows, subset(uniform, within[:, None], count[..., None]), level)

    def views(self, rows: Rows, mask: Tensor, level: Tensor) -> Views:
        """The views of given masks, bool `[B, J, L]`, and levels, `[B, J]`; complements are added here.

        Levels are read for the `bernoulli` form alone; counts say their own.
        """
        within = in_scope(rows, self.scope)[:, None]
        mask, level = mask & within, level.double()[..., None]
        block, blocks = self._blocks(rows)

        def in_block(hidden: Tensor) -> Tensor:  # how many of its block are hidden, for each token
            each = block[:, None].expand_as(hidden)
            return of_blocks(hidden, each, blocks).gather(-1, each)

        size, count = in_block(within), in_block(mask)
        weight = self._weight(mask, level, size, count)
        if self.complement:
            other = within & ~mask
            if self.form == "count":
                other = torch.where(count == size, mask, other)  # nothing is left
            weight = torch.stack([weight, self._weight(other, 1 - level, size, in_block(other))], dim=2).flatten(1, 2)
            mask = torch.stack([mask, other], dim=2).flatten(1, 2)
        return as_views(rows, mask, weight / mask.shape[1], self.scope)

    def per_draw(self, log_probs: Tensor, views: Views) -> Tensor:
        """The estimates `[B, J]` that the sequence's estimate is the mean of: one per view, or per pair."""
        each = (log_probs * views.weight.to(log_probs.dtype)).sum(-1) * views.weight.shape[1]
        return each.unflatten(1, (-1, 2)).mean(-1) if self.complement else each

    def _blocks(self, rows: Rows) -> tuple[Tensor, int]:
        """What counts are of: each token's block, long `[B, L]`, and their number; one without `per_block`."""
        if not self.per_block:
            return torch.zeros_like(rows.canvas_ids), 1
        assert self.block_length is not None
        # As many as any prompt could make of this canvas, so that the number depends on no row.
        most = (rows.canvas_ids.shape[1] + 2 * self.block_length - 2) // self.block_length
        return blocks_of(rows, self.block_length, self.block_origin), most

    def _weight(self, mask: Tensor, level: Tensor, size: Tensor, count: Tensor) -> Tensor:
        if self.form == "bernoulli":
            weight = 1 / level
        else:
            weight = (size + 1 if self.form == "count_with_zero" else size) / count.double()
        return torch.where(mask, weight, 0.0)
