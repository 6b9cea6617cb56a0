"""One step of each block of a decoding in random order (dTRPO, arXiv 2603.18806; our reading of it).

A block of L_b tokens is written in S_b = ceil(L_b / k) steps of k tokens, in a uniformly random order. Of each block
one step s ~ U{1..S_b} is drawn: what is written from then on is hidden, and the tokens of step s are scored. With
weight S_b the sum of the scores is an unbiased estimate of the sum over all steps of all blocks, for k = 1 of the
evidence lower bound. Blocks that a model scores given finished ones before them (`scoring.py`) fit into one
forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, as_views, blocks_of, check_count, check_scope, in_scope, of_blocks
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class OneStepPerBlock(Estimator):
    """K views, each with one step of every block.

    Args:
        num_views: K; the mean over them is taken.
        block_length: of blocks.
        tokens_per_step: k.
        weighted: whether a step counts for all S_b of its block, or for one.
        block_origin: where blocks start; see `DiffusionSpec`.
        scope: `"valid"` tokens or the whole `"canvas"`.
    """

    num_views: int = 1
    block_length: int = 32
    tokens_per_step: int = 1
    weighted: bool = True
    block_origin: str = "response"
    scope: str = "valid"

    def __post_init__(self) -> None:
        for name in ("num_views", "block_length", "tokens_per_step"):
            check_count(name, getattr(self, name))
        check_scope(self.scope)

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """Without weights a token counts for 1 / S_b."""
        return not self.weighted

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views."""
        noise, within = RowNoise(rows, seed, iteration), in_scope(rows, self.scope)
        block = blocks_of(rows, self.block_length, self.block_origin)
        most = (rows.canvas_ids.shape[1] + 2 * self.block_length - 2) // self.block_length
        each = block[:, None].expand(-1, self.num_views, -1)
        size = of_blocks(within, block, most)  # [B, N]
        steps = -(size // -self.tokens_per_step)
        chosen = (noise.spread_in_blocks("one step", self.num_views, most, "none") * steps[:, None]).long()  # [B, K, N]
        uniform = noise.per_token("one step order", self.num_views)
        keys = (block[:, None] + uniform).masked_fill(~within[:, None], torch.inf)
        rank = keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        first = (size.cumsum(-1) - size).gather(-1, block)[:, None]
        step = (rank - first).div(self.tokens_per_step, rounding_mode="floor")  # of each token in its block
        now = chosen.gather(-1, each)
        hidden = within[:, None] & (step >= now)
        weight = steps.gather(-1, block)[:, None].double() if self.weighted else torch.ones_like(uniform)
        scored = within[:, None] & (step == now)
        return as_views(rows, hidden, torch.where(scored, weight, 0.0) / self.num_views, self.scope)
