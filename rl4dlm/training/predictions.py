"""What steps of a rollout predicted for the whole canvas: for algorithms that take such answers for actions.

Owns which rollouts have such predictions, and how they are read from the record. Views of them are
`rl4dlm.likelihood.predictions`'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rl4dlm.likelihood.predictions import PredictedSteps
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout


class Predictions(NamedTuple):
    """Of N rows and S steps, as many as the row with most of them made."""

    shown: Tensor  # long [N, S, L], the canvas before each step; behind a row's last, as it ended
    drawn: Tensor  # long [N, S, L], what the step drew for open slots, what it showed elsewhere; -1 behind a row's last
    there: Tensor  # bool [N, S], whether the row made the step

    def completed(self, canvas: Tensor) -> Tensor:
        """The predicted canvases, long `[N, S, L]`; behind a row's last step the one that it ended with, `[N, L]`."""
        return torch.where(self.there[..., None], self.drawn, canvas[:, None])


def predicted_steps(spec: DiffusionSpec, decoding: DecodingConfig, algorithm: str) -> PredictedSteps:
    """The estimator of predictions.

    Raises:
        ValueError: models and schedules whose predictions are not of whole canvases.
    """
    if spec.attention in BLOCK_KINDS:
        raise ValueError(
            f"attention={spec.attention!r} is not supported: {algorithm}'s predictions are of all open slots, and "
            "blocks behind the active one would be scored with finished blocks before them"
        )
    schedule = decoding.build_schedule()
    if any(getattr(schedule, part, None) is not None for part in ("resize", "edit", "inputs")):
        raise ValueError(
            f"schedule={decoding.schedule!r} is not allowed: it changes the length of the canvas, takes slots out or "
            "feeds something else than tokens"
        )
    assert spec.mask_token_id is not None
    return PredictedSteps(spec.mask_token_id)


def recorded_predictions(rollout: Rollout) -> Predictions:
    """Those of a rollout that has recorded fillings."""
    trace = rollout.trace
    assert trace.fillings is not None
    drawn = trace.fillings[:, :, 0].long()
    shown = torch.stack([*rollout.states()], dim=1)
    return Predictions(shown, drawn, trace.steps[:, None] > torch.arange(drawn.shape[1], device=drawn.device))
