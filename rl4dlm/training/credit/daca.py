"""DACA's denoising progress: tokens weigh by when the model's prediction of them was final (arXiv 2605.16342).

Each step predicts all open slots. With xhat_s the most probable token of a slot at step s = 1..S, y what was written
there in the end, and l the last step with xhat_l != y (0: there is none),

    p = 1 - l / S,        weights: "early" p, "late" 1 - p = l / S,

over their mean in the completion, so that they are 1 on average. "late" weighs what the model had to find out on the
way, "early" what it knew from the start and all else follows from.

The paper has the idea, weights from predictions that the rollout makes anyway; its formula could not be read, and
this one is ours. So is what the weights are of: of the gradient of each log-probability, in every term of a loss. The
paper's other half, a likelihood by strata of positions, is not here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.credit.credit import Credit

KINDS = ("late", "early")
PREDICTIONS = "predictions"


class DACA(Credit):
    """Weights of tokens by denoising progress; see the module.

    Args:
        kind: which tokens weigh more, those whose prediction was final `"late"`, or `"early"`.

    Raises:
        ValueError: another kind; with a trainer, a schedule that changes the length of the canvas.
    """

    weighs_tokens: ClassVar[bool] = True

    def __init__(self, kind: str = "late") -> None:
        check_choice("kind", kind, KINDS)
        self.kind = kind

    def recorded(self, decoding: DecodingConfig) -> dict[str, Any]:
        """Predictions of every step."""
        if getattr(decoding.build_schedule(), "resize", None) is not None:
            raise ValueError(
                f"schedule={decoding.schedule!r} is not allowed with credit=DACA: it changes the length of the canvas, "
                "so that a slot is not the same one in each step"
            )
        return {"record": (*decoding.record, PREDICTIONS)}

    def token_weights(self, rollout: Rollout) -> Tensor:
        """float64 `[B, L]`, 1 on average over the tokens of a row that were drawn up to its end; 1 elsewhere."""
        predictions = rollout.trace.predictions
        assert predictions is not None
        settled = settled_after(predictions, rollout.canvas) / rollout.trace.steps.clamp(min=1)[:, None].double()
        return progress_weights(settled, rollout.valid & (rollout.trace.commit_step >= 0), self.kind)


def settled_after(predictions: Tensor, canvas: Tensor) -> Tensor:
    """l: the last step, counted from 1, that predicted another token than was written; long `[B, L]`, 0 if none did.

    Args:
        predictions: int `[B, S, L]`, -1 where a row made no such step. canvas: long `[B, L]`.
    """
    other = (predictions >= 0) & (predictions != canvas[:, None])
    step = torch.arange(1, predictions.shape[1] + 1, device=canvas.device)[:, None]
    return (other * step).amax(1) if predictions.shape[1] else torch.zeros_like(canvas)


def progress_weights(settled: Tensor, counted: Tensor, kind: str) -> Tensor:
    """Weights `[B, L]` from l / S `[B, L]`; all 1 in a row where no counted token has any."""
    share = settled if kind == "late" else 1 - settled
    mean = (share * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.where(mean > 0, share / torch.where(mean > 0, mean, 1.0), 1.0)
    return torch.where(counted, weights, torch.ones_like(weights))
