"""Bounds from views that follow block-wise decoding: SPG's lower and upper ones, and a true lower bound.

Sandwiched policy gradient (SPG, arXiv 2510.09541) hides, in each of m views of a completion with |y| valid tokens,
a random number of tokens of one random block and all later blocks; prompt tokens and tokens of earlier blocks are
hidden with probability p. With M_v the hidden valid tokens of view v and t_v = |M_v| / |y|,

    lower   |y| * mean_v 1/|M_v| sum_{i in M_v} log p_i              = sum_i sum_v w_v log p_i,    w_v = 1 / (m t_v)
    upper   |y| / |U| * sum_{i in U} 1/beta log sum_v w_v p_i^beta,    U the union of the M_v
    mix     omega * upper + (1 - omega) * lower

on the scale of a sequence: the paper's code divides by |y| and multiplies by it again in its loss. A score in the upper
bound is linear in the lower one's with weights that depend on the model, so that both differ only at tokens that
several views hide.

What they are not. Later blocks are hidden in more views than earlier ones, and 1/t counts the hidden share of the
whole, so the lower one is a reweighted bound (`reweighted`), not that of block-wise decoding nor of any other; in mode
`"random"` without prompt masking it is the evidence lower bound. The upper one is an upper bound of log p for beta >=
|y| only (Hoelder); for 1 <= beta < |y| it falls below log p in models whose conditionals do not fit together, as real
ones' do not, and an estimate from a few views is biased: too large from one view, too small from three or more in the
models that were enumerated.

`BlockELBO` is the bound of what block-wise decoding does: each block is written in random order given the finished ones
before it, with everything behind it hidden,

    log p(y) >= sum_b ELBO(y_b | y_{<b}).

A view takes one block b of w tokens, hides and scores c ~ U{1..w} of them, hides all later blocks, and counts
(number of blocks / views) * w / c.

Decided differently from the released code: views of a row take different blocks, each block equally often; the code
takes the first of a permutation of the canvas's blocks modulo the number of valid ones (`block_choice="published"`).
Exponentials are taken of float32 differences (logsumexp), not of probabilities in the model's dtype, which may
underflow to "never hidden". Later blocks and perturbed earlier tokens are scored, as there; `scored="block"` leaves
that to the view's own block.
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
    check_scope,
    check_share,
    count_of,
    in_scope,
    subset,
)
from rl4dlm.likelihood.views import Rows, Views

MODES = ("block_random", "block_all", "random", "all")
BOUNDS = ("elbo", "eubo", "mix")


@dataclass(frozen=True)
class BlockwiseBound(Estimator):
    """SPG's views and bounds.

    Args:
        num_views: m.
        mode: what is hidden: `"block_random"`, some tokens of a block and all later blocks; `"block_all"`, a block and
            all later ones; `"random"`, a random number of all tokens; `"all"`, all tokens.
        bound: what `reduce` makes of log-probabilities: `"elbo"` (lower), `"eubo"` (upper) or `"mix"`.
        beta: exponent of the upper bound, 1 or larger.
        mix_weight: omega, share of the upper bound.
        block_length: tokens of a block, counted from the start of the canvas.
        p_mask_prompt: probability that a prompt token or a token of an earlier block is hidden.
        block_choice: `"stratified"` or `"published"`, see above.
        scored: all `"hidden"` tokens, or those of the view's own `"block"`.
        scope: `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_views: int = 2
    mode: str = "block_random"
    bound: str = "mix"
    beta: float = 1.5
    mix_weight: float = 0.5
    block_length: int = 32
    p_mask_prompt: float = 0.15
    block_choice: str = "stratified"
    scored: str = "hidden"
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_count("num_views", self.num_views)
        check_count("block_length", self.block_length)
        check_choice("mode", self.mode, MODES)
        check_choice("bound", self.bound, BOUNDS)
        check_choice("block_choice", self.block_choice, ("stratified", "published"))
        check_choice("scored", self.scored, ("hidden", "block"))
        check_share("p_mask_prompt", self.p_mask_prompt)
        check_share("mix_weight", self.mix_weight)
        if not self.beta >= 1:
            raise ValueError(f"beta={self.beta} is not allowed; it must be 1 or larger")
        check_scope(self.scope)

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """True where some blocks count more than others."""
        return self.mode.startswith("block")

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """m views."""
        noise, within = RowNoise(rows, seed, iteration), in_scope(rows, self.scope)[:, None]
        if self.mode.startswith("block"):
            block = self._blocks(noise, within)  # [B, m]
        else:
            block = torch.zeros(len(rows), self.num_views, dtype=torch.long, device=within.device)
        place = self._place(within, block)
        mask = within & (place == 0)  # [B, m, L]
        if self.mode.endswith("random"):
            count = count_of(noise.per_view("spg count", self.num_views), 1, mask.sum(-1))
            mask = subset(noise.per_token("spg mask", self.num_views), mask, count[..., None])
        earlier = (noise.per_token("spg earlier", self.num_views) < self.p_mask_prompt) & (place < 0)
        prompt = noise.per_prompt_token("prompt mask", self.num_views) < self.p_mask_prompt
        mask = mask | earlier | (place > 0)
        return self.views(rows, mask, prompt & rows.prompt_mask[:, None], block)

    def views(self, rows: Rows, mask: Tensor, prompt: Tensor, block: Tensor | None = None) -> Views:
        """The views of given masks of the canvas, bool `[B, m, L]`, and prompt, bool `[B, m, P]`.

        Args:
            block: long `[B, m]`, each view's block; needed for `scored="block"`.
        """
        within = in_scope(rows, self.scope)[:, None]
        scored = mask & within
        if self.scored == "block":
            assert block is not None
            scored = scored & (self._place(within, block) == 0)
        share = scored.sum(-1, keepdim=True).double() / within.sum(-1, keepdim=True)  # t, [B, m, 1]
        weight = torch.where(scored, 1 / (share * self.num_views), 0.0)
        return as_views(rows, mask, weight, self.scope, prompt)

    def reduce(self, log_probs: Tensor, views: Views) -> Tensor:
        """Scores `[B, L]` of the bound; their sum is the sequence's."""
        return self.reduce_to(self.bound, log_probs, views)

    def reduce_to(self, bound: str, log_probs: Tensor, views: Views) -> Tensor:
        """Scores `[B, L]` of one of the bounds, whatever the estimator's own is."""
        check_choice("bound", bound, BOUNDS)
        if bound == "elbo":
            return super().reduce(log_probs, views)
        upper = upper_bound(log_probs, views, self.beta)
        if bound == "eubo":
            return upper
        return self.mix_weight * upper + (1 - self.mix_weight) * super().reduce(log_probs, views)

    def _blocks(self, noise: RowNoise, within: Tensor) -> Tensor:
        count = -(within.sum(-1) // -self.block_length)  # [B, 1], blocks with a token in scope
        if self.block_choice == "stratified":
            return count_of(noise.spread("spg block", self.num_views, "views"), 0, count - 1)
        blocks = -(within.shape[-1] // -self.block_length)
        order = noise.per_view("spg block order", blocks).argsort(dim=-1)  # [B, blocks]
        picked = torch.arange(self.num_views, device=order.device) % blocks
        return order[:, picked] % count.clamp(min=1)

    def _place(self, within: Tensor, block: Tensor) -> Tensor:
        """Blocks between each token and the view's block, long `[B, m, L]`; negative before it."""
        offset = torch.arange(within.shape[-1], device=within.device)
        if not self.mode.startswith("block"):
            offset = torch.zeros_like(offset)
        return offset // self.block_length - block[..., None]


def upper_bound(log_probs: Tensor, views: Views, beta: float) -> Tensor:
    """SPG's upper bound, scores `[B, L]`: `1/beta log sum_v w_v p^beta` at tokens that some view scores.

    They are scaled so that their mean counts for as many tokens as the weights add up to: |y| for SPG's views.

    Args:
        log_probs: `[B, K, L]`, float32 or wider.
        views: with the weights w, 1 / (K t) for SPG.
        beta: the exponent.
    """
    scored = views.scored
    weight = views.weight.to(log_probs.dtype)
    union = scored.any(1)  # [B, L]
    terms = beta * log_probs + torch.where(scored, weight, 1.0).log()
    # Tokens that no view scores get zeros: a logsumexp of nothing but -inf has no gradient.
    terms = torch.where(scored, terms, torch.where(union, -torch.inf, 0.0)[:, None].to(terms.dtype))
    scale = weight.sum((1, 2)) / union.sum(-1).clamp(min=1)
    return torch.where(union, terms.logsumexp(1) / beta, 0.0) * scale[:, None]


@dataclass(frozen=True)
class BlockELBO(Estimator):
    """The evidence lower bound of block-wise decoding; the sum of the scores is an estimate. Prompts are never hidden.

    Args:
        num_views: K; they are spread over the blocks of a completion.
        block_length: tokens of a block, counted from the start of the canvas.
        scope: `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    num_views: int = 2
    block_length: int = 32
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_count("num_views", self.num_views)
        check_count("block_length", self.block_length)
        check_scope(self.scope)

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views."""
        noise, within = RowNoise(rows, seed, iteration), in_scope(rows, self.scope)[:, None]
        blocks = -(within.sum(-1) // -self.block_length)  # [B, 1]
        block = count_of(noise.spread("block elbo block", self.num_views, "views"), 0, blocks - 1)  # [B, K]
        own = within & (self._of_tokens(within) == block[..., None])
        count = count_of(noise.per_view("block elbo count", self.num_views), 1, own.sum(-1))
        mask = subset(noise.per_token("block elbo mask", self.num_views), own, count[..., None])
        return self.views(rows, mask, block)

    def views(self, rows: Rows, mask: Tensor, block: Tensor) -> Views:
        """The views of given blocks, long `[B, K]`, and masks of their tokens, bool `[B, K, L]`."""
        within = in_scope(rows, self.scope)[:, None]
        place = self._of_tokens(within) - block[..., None]  # [B, K, L]
        own = within & (place == 0)
        mask = mask & own
        size, count = own.sum(-1, keepdim=True), mask.sum(-1, keepdim=True).double()
        blocks = -(within.sum(-1, keepdim=True) // -self.block_length)
        weight = torch.where(mask, blocks * size / (count * block.shape[1]), 0.0)
        return as_views(rows, mask | (place > 0), weight, self.scope)

    def _of_tokens(self, within: Tensor) -> Tensor:
        return torch.arange(within.shape[-1], device=within.device) // self.block_length
