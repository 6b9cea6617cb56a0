"""Views of what recorded steps would have made of the whole canvas at once: every open slot, in the state before them.

The tokens that are scored are those that a step drew, whether it kept them or not, so that a view shows a canvas of its
own and asks for tokens of its own. In the state before it each of them has the log-probability that it was drawn with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.views import Rows, Views


@dataclass(frozen=True)
class PredictedSteps(Estimator):
    """One view per recorded step (MDPO, arXiv 2508.13148); which steps, and what they drew, is in the rows' facts.

    Args:
        mask_token_id: of the model; what open slots hold.
        scope: what a loss is about; views score all open slots.

    Raises:
        ValueError: in `draw`, rows without such facts.
    """

    fresh: ClassVar[bool] = False  # type: ignore[misc]
    reweighted: ClassVar[bool] = True  # type: ignore[misc]
    reads_record: ClassVar[bool] = True  # type: ignore[misc]
    mask_token_id: int
    scope: str = "valid"

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views; one in which nothing is open scores nothing."""
        facts = rows.facts
        if facts is None or facts.shown is None or facts.predicted is None:
            raise ValueError("predictions of recorded steps are needed: `shown` and `predicted` of the rows' facts")
        shown, predicted = facts.shown, facts.predicted
        count, width = shown.shape[1], rows.prompt_ids.shape[1]
        prompt = rows.prompt_ids[:, None].expand(-1, count, -1)
        hidden = torch.ones_like(shown, dtype=torch.bool)
        return Views(
            hidden=torch.cat([hidden.new_zeros(*shown.shape[:2], width), hidden], dim=-1),
            weight=(shown == self.mask_token_id).double(),
            ids=torch.cat([prompt, shown], dim=-1),
            targets=predicted,
        )
