"""A likelihood by strata of positions (DACA-GRPO, arXiv 2605.16342): every token is scored beside most of the others.

The tokens of a completion are split at random into Q strata of equal size, one token more or less. View q hides stratum
q and shows all others, so that each token is scored once, in the one view that hides it, and its score is its
log-probability there. Q = 1 is the mean field; with as many strata as tokens the sum is the pseudo-likelihood.

For Q > 1 that is no log-likelihood, nor a bound of one: two tokens that follow from each other are both certain, and
the sum is 0 whatever the probability of the pair (enumerated in the tests). So ratios of whole sequences are refused.
The paper's abstract says that each stratum is predicted with the rest visible; that strata are random, anew in each
pass, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, as_views, check_count, check_scope, check_share, in_scope
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class Strata(Estimator):
    """Q views, each of which hides a stratum.

    Args:
        count: Q.
        p_mask_prompt: probability that a prompt token is hidden, in each view anew.
        scope: `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    count: int = 4
    p_mask_prompt: float = 0.0
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_share("p_mask_prompt", self.p_mask_prompt)
        check_scope(self.scope)

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        """Whether the views of two iterations can differ."""
        return self.count > 1 or 0 < self.p_mask_prompt < 1

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """Whether the sum of the scores is no log-likelihood."""
        return self.count > 1

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """Q views; `weight` `[B, Q, L]` is 1 where a view hides a token in scope."""
        noise, within = RowNoise(rows, seed, iteration), in_scope(rows, self.scope)
        order = noise.per_token("strata", 1)[:, 0].masked_fill(~within, torch.inf)
        rank = order.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        size = within.sum(-1, keepdim=True).clamp(min=1)
        stratum = (rank * self.count).div(size, rounding_mode="floor")
        number = torch.arange(self.count, device=stratum.device)[:, None]
        hidden = (stratum[:, None] == number) & within[:, None]
        prompt = noise.per_prompt_token("strata prompt mask", self.count) < self.p_mask_prompt
        return as_views(rows, hidden, hidden.double(), self.scope, prompt & rows.prompt_mask[:, None].bool())
