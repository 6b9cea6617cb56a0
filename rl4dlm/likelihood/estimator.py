"""What a likelihood estimator is: a pure function from rows to views, and a reduction from log-probabilities to scores.

Owns the contract and the linear reduction. One file per estimator; forwards are `scoring.py`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from rl4dlm.likelihood.views import Rows, Views

SCOPES = ("valid", "canvas")


class Estimator(ABC):
    """Draws views and reduces the log-probabilities of what they hide to scores.

    Attributes:
        scope: which tokens the loss is about: `"valid"` ones (up to the first end of sequence) or the whole `"canvas"`.
        fresh: whether each inner iteration sees other views than the one before.
        noise: the corruption that its views are, as in `DiffusionSpec`.
        reweighted: whether the weights of a token do not add up to 1 on average, so that the sum of the scores is no
            estimate of a log-likelihood or of a bound of it, only proportional to one at best.
        as_drawn: whether a token's score is its log-probability given what was written when it was drawn, in the order
            of decoding that the estimator is meant for.
        shares_masks: whether completions of a prompt may have the same masks, which leaves the estimate of each as it
            is and correlates them: rows are then given the same `row_ids`.
        views_vary: whether the number of views depends on the rows. Views that score something come first in a row, so
            that those behind the last that any process needs can be left out.
        reads_record: whether it needs to know how a completion was written, and not the completion alone.
    """

    scope: str = "valid"
    fresh: bool = True
    noise: ClassVar[str] = "mask"
    reweighted: bool = False
    as_drawn: bool = False
    shares_masks: bool = False
    views_vary: bool = False
    reads_record: bool = False

    @abstractmethod
    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """Views of `rows`: a function of (seed, row id, iteration) and the row's own tokens, nothing else.

        So a row has the same views in every batch, on every rank, for the old, the reference and the current policy.
        """

    def reduce(self, log_probs: Tensor, views: Views) -> Tensor:
        """Scores `[B, L]` from log-probabilities `[B, K, L]`: their weighted sum over views."""
        return (log_probs * views.weight.to(log_probs.dtype)).sum(1)
