"""Complementary pairs of views whose tokens all count the same (GDSD, arXiv 2605.29398).

Every token of a completion is scored once by a pair, whichever of its two views hides it, and counts for one half there
as in the mean of the two. That is no estimate of a bound: a token that is hidden beside few others, for which the
context tells most, counts as much as one beside many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO


@dataclass(frozen=True)
class FlatPairs(ELBO):
    """Views of `ELBO(form="count_with_zero", complement=True)` whose tokens weigh 1 / `num_views` each.

    Raises:
        ValueError: another form, or no complements: tokens would count unevenly.
    """

    form: str = "count_with_zero"
    complement: bool = True

    def __post_init__(self) -> None:
        if self.form != "count_with_zero" or not self.complement:
            raise ValueError(
                f"form={self.form!r} with complement={self.complement} is not allowed for flat pairs, which score "
                "every token once; choose count_with_zero and True"
            )
        super().__post_init__()

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """The weights of a token add up to 1/2."""
        return True

    def _weight(self, mask: Tensor, level: Tensor, size: Tensor, count: Tensor) -> Tensor:
        return torch.where(mask, 1.0, 0.0).double()
