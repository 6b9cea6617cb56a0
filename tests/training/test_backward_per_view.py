"""A backward pass for each view gives the gradients of one pass for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import ESPOConfig, ESPOTrainer, JustGRPOTrainer, SPGTrainer
from rl4dlm.likelihood.scoring import ViewScores
from rl4dlm.likelihood.views import Views
from rl4dlm.training.backward_per_view import loss_per_view
from tests.training.steps import one_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_any_loss_of_all_views_together(entropy: float) -> None:
    """A loss that no sum over views makes up, of scores that depend on the view and on shared weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.rand(2, 3, 5, generator=generator) < 0.5
    views = Views(hidden, hidden.double())

    def score(part: Views) -> ViewScores:
        found = torch.sin(weights * (1 + part.hidden.sum(-1, keepdim=True))) * part.weight
        return ViewScores(found, found.square())

    def loss(found: ViewScores) -> Tensor:
        value = found.log_probs.sum((1, 2)).exp().prod()
        return value + entropy * found.entropies.mean() if entropy else value

    whole = loss(score(views))
    (expected,) = torch.autograd.grad(whole, weights)
    with torch.no_grad():
        found = score(views)

    passes: list[int] = []

    def backward(forward: Callable[[], Tensor]) -> None:
        passes.append(1)
        forward().backward()

    value = loss_per_view(found, views, score, loss, backward)
    value.backward()
    assert len(passes) == 2 and value.item() == pytest.approx(whole.item(), abs=1e-12)
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("trainer", "views", "settings"),
    [
        (ESPOTrainer, 4, {"num_views": 4}),
        (SPGTrainer, 3, {"num_views": 3, "block_length": 4}),
        (JustGRPOTrainer, 8, {"denoising_steps": None, "num_iterations": 1}),
    ],
)
def test_re_entrant_layers_change_nothing(
    make_trainer: Any, trainer: type, views: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = one_step(make_trainer, trainer, one_view=True, **settings)
    backwards = []
    part = trainer._backward_of_part  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer, "_backward_of_part", lambda *a: (backwards.append(1), part(*a)))
    _, found = one_step(make_trainer, trainer, one_view=True, **settings, **REENTRANT)
    assert len(backwards) == views - 1, "the last one is the trainer's own"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_views_that_would_score_otherwise_the_second_time_are_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="disable_dropout=False is not supported with one_view=True"):
        make_trainer(trainer=ESPOTrainer, config=ESPOConfig, one_view=True, disable_dropout=False, **REENTRANT)
