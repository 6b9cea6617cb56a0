"""The exact likelihood of decoding from left to right (JustGRPO, arXiv 2601.15165).

View i shows the prompt and the tokens before token i, hides the rest, and scores token i. For completions that were
decoded one token at a time from left to right, the scores are the log-probabilities they were drawn with, and their sum
is the log-likelihood: no approximation, at the price of one view per token. Use it with `one_view=True`, which needs
the memory of a single view.

With c tokens per view there are L / c views, each scoring c tokens given those before the first of them: exact where c
tokens were written per step, else a mean field within each group.

A model that denoises block by block scores every block in one view, given the finished ones before it. With
`within="block"` view k is therefore the state at token k of every block at once: as many views as a block has tokens
instead of as many as the canvas, each of the same scores.

The number of views is that of the canvas even for short completions, so that every process runs as many; the views
behind the last valid token score nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import as_views, blocks_of, check_choice, check_count, check_scope, in_scope
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.spec import GRID_ORIGINS

WITHIN = ("canvas", "block")


@dataclass(frozen=True)
class LeftToRight(Estimator):
    """One view per token, or per group of tokens: what comes before is shown. Nothing is random.

    Args:
        tokens_per_view: c; the last group may be smaller.
        scope: `"valid"` tokens or the whole `"canvas"`.
        within: what tokens are counted in: the `"canvas"`, or each `"block"`, which only attention in blocks can score.
        block_length, block_origin: of the blocks, those of the model's attention; see `DiffusionSpec`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    fresh: ClassVar[bool] = False  # type: ignore[misc]
    as_drawn: ClassVar[bool] = True  # type: ignore[misc]
    tokens_per_view: int = 1
    scope: str = "valid"
    within: str = "canvas"
    block_length: int | None = None
    block_origin: str = "response"

    def __post_init__(self) -> None:
        check_count("tokens_per_view", self.tokens_per_view)
        check_scope(self.scope)
        check_choice("within", self.within, WITHIN)
        check_choice("block_origin", self.block_origin, GRID_ORIGINS)
        if self.within == "block":
            check_count("block_length", self.block_length)  # type: ignore[arg-type]
        elif self.block_length is not None or self.block_origin != "response":
            raise ValueError(
                f"block_length={self.block_length} and block_origin={self.block_origin!r} have no effect with "
                "within='canvas'; leave them out"
            )

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """`ceil(L / c)` views, or `ceil(b / c)` for blocks of b tokens."""
        within = in_scope(rows, self.scope)[:, None]  # [B, 1, L]
        place, most = self._places(rows)  # [B, L]
        start = torch.arange(0, most, self.tokens_per_view, device=place.device)[:, None]  # [K, 1]
        hidden = place[:, None] >= start
        scored = hidden & (place[:, None] < start + self.tokens_per_view) & within
        return as_views(rows, hidden, scored.double(), self.scope)

    def _places(self, rows: Rows) -> tuple[Tensor, int]:
        """How many slots of the canvas, or of its block, are before each one, long `[B, L]`, and their largest number.

        A block that begins in the prompt counts from the first slot of the canvas, where decoding begins.
        """
        length = rows.canvas_ids.shape[1]
        offset = torch.arange(length, device=rows.canvas_ids.device).expand(len(rows), -1)
        if self.within == "canvas":
            return offset, length
        assert self.block_length is not None
        block = blocks_of(rows, self.block_length, self.block_origin)
        earlier = (block[:, None] < block[..., None]).sum(-1)  # slots in the blocks before
        return offset - earlier, min(self.block_length, length)
