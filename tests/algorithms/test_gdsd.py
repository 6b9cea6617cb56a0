"""GDSD: its first step from plain logits, its targets, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import GDSDConfig, GDSDTrainer
from rl4dlm.likelihood.views import Views
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import adapter_step, check_gradient, check_splits, one_step, plain_log_probs, sequences_mean

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def pairs_of(trainer: Any, record: dict[str, Any]) -> Tensor:
    """Weighted sums `[B, J]` of the two views of a pair, each the mean of both, from plain logits."""
    log_probs, views = plain_log_probs(trainer, record)
    return trainer.estimator.per_draw(log_probs, views)


@pytest.mark.parametrize("weights", ["flat", "elbo"])
def test_the_first_step_is_that_of_reinforce_on_pairs(make_trainer: Any, weights: str) -> None:
    """theta = old: the loss is psi^2 mean A^2, its gradient -(2 psi / n) A grad D."""
    trainer, gradients = one_step(make_trainer, GDSDTrainer, beta=0.1, psi=0.7, weights=weights)
    record = trainer.seen[0]
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert trainer.state.log_history[0]["gdsd/change"] == pytest.approx(0, abs=1e-7)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.49 * record["advantages"].square().mean().item())
    length = record["completion_mask"].sum(-1)
    objective = -(2 * 0.7 / length) * record["advantages"] * pairs_of(trainer, record).mean(-1)
    check_gradient(trainer, objective.mean(), gradients)


def test_with_the_weights_of_the_bound_it_is_espos_step_times_two_psi(make_trainer: Any) -> None:
    trainer, gradients = one_step(make_trainer, GDSDTrainer, beta=0.0, psi=2.0, weights="elbo")
    check_gradient(trainer, 4.0 * sequences_mean(trainer, trainer.seen[0]), gradients)


def test_flat_pairs_score_every_token_once(make_trainer: Any) -> None:
    trainer, _ = one_step(make_trainer, GDSDTrainer, beta=0.0, num_views=6)
    _, views = plain_log_probs(trainer, trainer.seen[0])
    scored = views.weight.unflatten(1, (3, 2)) * 6
    assert torch.equal(scored.sum(2), torch.ones_like(scored.sum(2)))
    assert trainer.estimator.reweighted


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    trainer = adapter_step(make_trainer, GDSDTrainer, beta=0.1)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7)


def test_splitting_a_batch_changes_nothing(make_trainer: Any) -> None:
    check_splits(make_trainer, GDSDTrainer, beta=0.1, max_steps=2)


def test_centred_logits_are_trained(make_trainer: Any) -> None:
    settings = {"beta": 0.0, "target": "centred_logit", "unit": "token", "residual": "huber", "residual_limit": 0.2}
    trainer, gradients = one_step(make_trainer, GDSDTrainer, **settings)
    assert any(gradient.abs().max() > 1e-5 for gradient in gradients.values())
    head = gradients["lm_head.weight"]
    torch.testing.assert_close(head.sum(0), torch.zeros_like(head[0]), rtol=0, atol=1e-5)  # over the vocabulary
    assert trainer.state.log_history[0]["diffusion/rollout_gap"] == 0


# --- the loss on its own ----------------------------------------------------------------------------------------------


def loss_of(
    make_trainer: Any, change: float, advantages: list[float], length: int = 8, graded: Any = None, **settings: Any
) -> tuple[float, Tensor]:
    """Loss, and its gradient by scores `[B, K, L]`, where each token of one pair of views has changed by `change`."""
    trainer = make_trainer(
        trainer=GDSDTrainer, config=GDSDConfig, num_views=2, **{"beta": 0.0, "weights": "flat", **settings}
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = len(advantages)
    hidden = torch.zeros(rows, 2, length, dtype=torch.bool)
    hidden[:, 0, ::2] = hidden[:, 1, 1::2] = True
    views = Views(hidden, hidden.double() / 2)
    scores = torch.full((rows, 2, length), change - 2.0, dtype=torch.float64).requires_grad_()
    batch = {
        "completion_mask": torch.ones(rows, length, dtype=torch.long),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": torch.full((rows, 2, length), -2.0, dtype=torch.float64),
    }
    if graded is not None:
        rewards = torch.where(torch.tensor(graded), 1.0, torch.nan).double()[None]
        trainer.advantages(rewards, batch)
        assert batch["graded"].tolist() == graded
    nothing = torch.zeros(rows, length, dtype=torch.float64)
    loss = trainer.loss(PolicyScores(nothing, nothing, views, scores), batch)
    return loss.item(), torch.autograd.grad(loss, scores)[0]


def test_the_target_is_approached_from_both_sides_and_kept(make_trainer: Any) -> None:
    """D / n is half of what tokens have changed by, and its target psi A."""
    for advantage in (0.5, -0.5):
        below, slope = loss_of(make_trainer, advantage, [advantage], psi=1.0)
        assert below == pytest.approx((0.5 * advantage - advantage) ** 2)
        assert bool((slope * advantage <= 0).all()) and bool(slope.any())
        beyond, back = loss_of(make_trainer, 4 * advantage, [advantage], psi=1.0)
        assert beyond == pytest.approx((2 * advantage - advantage) ** 2)
        assert bool((back * advantage >= 0).all()) and bool(back.any())
        there, none = loss_of(make_trainer, 2 * advantage, [advantage], psi=1.0)
        assert there == pytest.approx(0, abs=1e-15) and float(none.abs().max()) < 1e-12


def test_without_a_reward_there_is_no_target(make_trainer: Any) -> None:
    """A completion that could not be graded has an advantage of 0, and is not drawn back to the old policy."""
    for unit in ("sequence", "token"):
        loss, slope = loss_of(make_trainer, 0.4, [0.0, 0.0], graded=[True, False], unit=unit)
        _, alone = loss_of(make_trainer, 0.4, [0.0], unit=unit)
        assert loss > 0 and not slope[1].any()
        torch.testing.assert_close(slope[0], alone[0] / 2)


def test_residuals_of_tokens(make_trainer: Any) -> None:
    loss, slope = loss_of(make_trainer, 0.3, [0.3, -0.1], psi=1.0, unit="token")
    assert loss == pytest.approx((0.0 + 0.4**2) / 2)
    assert float(slope[0].abs().max()) < 1e-12 and bool((slope[1] >= 0).all())


def test_hubers_pull_is_bounded_and_never_vanishes(make_trainer: Any) -> None:
    pulls = []
    for change in (0.0, -4.0, -400.0):
        _, slope = loss_of(make_trainer, change, [0.5], residual="huber", residual_limit=0.1)
        pulls.append(slope.abs().sum().item())
    assert pulls[0] == pytest.approx(pulls[2]) and pulls[1] == pytest.approx(pulls[2]) and pulls[0] > 0
    near, _ = loss_of(make_trainer, 0.9, [0.5], residual="huber", residual_limit=0.1)
    assert near == pytest.approx(0.05**2)


def test_the_published_clamp_stops_the_gradient_for_good(make_trainer: Any) -> None:
    """In both directions, as soon as the change of a sum leaves the range; so that nobody takes it for a mistake."""
    for change, moves in ((0.0, True), (1e-5, True), (1e-3, False), (-1e-3, False), (0.5, False)):
        _, slope = loss_of(make_trainer, change, [0.7], residual="clamped", psi=10.0)
        assert bool(slope.any()) == moves, change
    high = math.log(1 + 4e-4)
    loss, _ = loss_of(make_trainer, 0.5, [0.7], residual="clamped", psi=10.0)
    assert loss == pytest.approx((high / 8 - 7.0) ** 2)


def test_the_optimum_of_free_scores_is_the_tilted_old_policy(make_trainer: Any) -> None:
    """Newton's step of a quadratic loss, from anywhere: what is left of the gradient is zero at log p_old + 2 psi A."""
    for change in (-1.0, 0.4):
        _, slope = loss_of(make_trainer, change, [0.25], psi=2.0)
        summed = slope.sum().item()  # by all tokens at once: half a token's change is D / n
        reached = change - summed / 0.5
        assert reached == pytest.approx(2 * 2.0 * 0.25)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"psi": 0.0}, "psi=0.0 is not allowed; it must be larger than 0"),
        ({"target": "logit"}, "target='logit' is not allowed"),
        ({"weights": "even"}, "weights='even' is not allowed"),
        ({"epsilon": 0.2}, "epsilon=0.2 is not supported: it has no effect with residual='square'"),
        ({"residual_limit": 0.2}, "residual_limit=0.2 is not supported: it has no effect with residual='square'"),
        ({"residual": "clamped", "unit": "token"}, "residual='clamped' is not allowed with unit='token'"),
        ({"target": "centred_logit"}, "beta=0.001 is not allowed with target='centred_logit'"),
        ({"form": "count"}, "form='count' is not supported: it has no effect with weights='flat'"),
        ({"clip": "none"}, "clip='none' is not supported: the loss is a residual, not a ratio"),
        ({"num_views": 3}, "num_views=3 is not allowed with complement=True"),
        ({"loss_type": "grpo"}, "loss_type='grpo' is not supported"),
    ],
)
def test_what_is_refused(tmp_path: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        GDSDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert said in str(error.value)
