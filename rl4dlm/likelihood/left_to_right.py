"""The exact likelihood of decoding from left to right (JustGRPO, arXiv 2601.15165).

View i shows the prompt and the tokens before token i, hides the rest, and scores token i. For completions that were
decoded one token at a time from left to right, the scores are the log-probabilities they were drawn with, and their sum
is the log-likelihood: no approximation, at the price of one view per token. Use it with `one_view=True`, which needs
the memory of a single view.

With c tokens per view there are L / c views, each scoring c tokens given those before the first of them: exact where c
tokens were written per step, else a mean field within each group.

The number of views is that of the canvas even for short completions, so that every process runs as many; the views
behind the last valid token score nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import as_views, check_count, check_scope, in_scope
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class LeftToRight(Estimator):
    """One view per token, or per group of tokens: what comes before is shown. Nothing is random.

    Args:
        tokens_per_view: c; the last group may be smaller.
        scope: `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    fresh: ClassVar[bool] = False  # type: ignore[misc]
    as_drawn: ClassVar[bool] = True  # type: ignore[misc]
    tokens_per_view: int = 1
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_count("tokens_per_view", self.tokens_per_view)
        check_scope(self.scope)

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """`ceil(L / c)` views."""
        within = in_scope(rows, self.scope)[:, None]  # [B, 1, L]
        offset = torch.arange(within.shape[-1], device=within.device)
        start = offset[:: self.tokens_per_view, None]  # [K, 1]
        hidden = (offset >= start).expand(len(rows), -1, -1)
        scored = hidden & (offset < start + self.tokens_per_view) & within
        return as_views(rows, hidden, scored.double(), self.scope)
