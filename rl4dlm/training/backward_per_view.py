"""Backward passes of one view at a time, where views cannot share one.

`one_view=True` checkpoints each view inside the wrapped forward, so that one backward pass goes through all of them.
Layers that are checkpointed re-entrantly cannot be in there: their inner backward passes run before the outer one is
done, which DeepSpeed and DDP take for a second one. TRL makes layers re-entrant for adapters under ZeRO-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import ViewScores
from rl4dlm.likelihood.views import Views


def loss_per_view(
    found: ViewScores,
    views: Views,
    score: Callable[[Views], ViewScores],
    loss: Callable[[ViewScores], Tensor],
    backward: Callable[[Callable[[], Tensor]], None],
) -> Tensor:
    """A loss whose backward pass is that of the last view; those of the others have been run.

    Gradients of the loss by log-probabilities and entropies come first, without the model's; then those of the model,
    from one view after another. Exact if views score the same twice, for any loss.

    Args:
        found: log-probabilities and entropies `[B, K, L]`, and what else there is, without gradients.
        views: they are those of these K.
        score: the same in other views, `[B, 1, L]`, by the wrapped model and with gradients.
        loss: a scalar of them.
        backward: runs the forward that it is given, and its backward pass without synchronising gradients.

    Returns:
        The loss, a scalar.
    """

    def parts(scores: ViewScores) -> dict[str, Tensor]:
        return {name: part for name, part in scores._asdict().items() if part is not None}

    leaves = {name: part.detach().requires_grad_() for name, part in parts(found).items()}
    value = loss(ViewScores(**leaves))
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)

    def share(view: int) -> Tensor:
        scores = score(views.only(view))
        pairs = zip(parts(scores).values(), gradients, strict=True)
        return torch.stack([(s * g[:, view, None]).sum() for s, g in pairs if g is not None]).sum()

    last = views.hidden.shape[1] - 1
    for view in range(last):
        backward(functools.partial(share, view))
    final = share(last)
    return final - final.detach() + value.detach()
