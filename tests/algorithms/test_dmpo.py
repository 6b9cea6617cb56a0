"""DMPO: its weights, its first step from plain logits, its baselines, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import DMPOConfig, DMPOTrainer
from rl4dlm.algorithms.dmpo import effective_share, target_weights
from rl4dlm.algorithms.wd1 import signed_weights
from rl4dlm.likelihood.views import Views
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import adapter_step, check_gradient, check_splits, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

REWARDS = torch.tensor([[0.0, 1.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5]])
LOG_RATIO = torch.tensor([[0.3, -2.0, 1.0, 0.1], [5.0, -3.0, 0.0, 1.0]])

# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["negative", "mean"])
def test_with_a_baseline_weights_add_up_to_nothing(baseline: str) -> None:
    weights = target_weights(REWARDS, LOG_RATIO, alpha=0.5, baseline=baseline)
    torch.testing.assert_close(weights.sum(-1), torch.zeros(2).double())
    plain = target_weights(REWARDS, LOG_RATIO, alpha=0.5, baseline="none")
    torch.testing.assert_close(plain.sum(-1), torch.ones(2).double())
    half = target_weights(REWARDS, LOG_RATIO, alpha=0.5, baseline=baseline, strength=0.5)
    torch.testing.assert_close(half, (weights + plain) / 2)


def test_equal_rewards_have_no_weight_whatever_the_log_ratios() -> None:
    assert not target_weights(REWARDS, LOG_RATIO, alpha=0.04)[1].any()
    assert target_weights(REWARDS, LOG_RATIO, alpha=0.04, baseline="mean")[1].any()


def test_without_log_ratios_they_are_wd1s() -> None:
    torch.testing.assert_close(target_weights(REWARDS, 0 * LOG_RATIO, alpha=0.25), signed_weights(REWARDS, psi=4.0))
    torch.testing.assert_close(
        target_weights(REWARDS, LOG_RATIO, alpha=0.25, beta=0.0, kappa=0.5), signed_weights(REWARDS, psi=2.0)
    )


def test_a_flat_target_is_reinforce_with_the_mean_as_baseline() -> None:
    alpha = 1e4
    centred = (REWARDS - REWARDS.mean(-1, keepdim=True)).double()
    weights = target_weights(REWARDS, 0 * LOG_RATIO, alpha=alpha)
    torch.testing.assert_close(weights, 2 / (alpha * 4) * centred, rtol=0, atol=1e-11)


def test_a_completion_without_reward_has_no_weight() -> None:
    rewards = torch.tensor([[1.0, math.nan, 0.0, math.nan]])
    for baseline in ("negative", "mean", "none"):
        weights = target_weights(rewards, LOG_RATIO[:1], alpha=1.0, baseline=baseline)
        assert weights.isfinite().all() and not weights[0, [1, 3]].any() and weights[0, 0]


def test_the_effective_sample_size() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert effective_share(weights).tolist() == [1.0, 0.25]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["canvas", "valid"])
def test_the_first_step_is_the_weighted_cross_entropy(make_trainer: Any, scope: str) -> None:
    trainer, gradients = one_step(make_trainer, DMPOTrainer, scope=scope, alpha=0.5)
    record = trainer.seen[0]
    assert torch.equal(record["old_scores"], record["ref_scores"]), "same views, same weights"
    log_probs, views = plain_log_probs(trainer, record)
    scored = views.scored
    assert (scored[:, 0] ^ scored[:, 1]).sum(-1).tolist() == (
        [8] * 8 if scope == "canvas" else record["canvas_valid"].sum(-1).tolist()
    )
    each = (log_probs * scored).sum(-1) / scored.sum(-1).clamp(min=1)
    check_gradient(trainer, -(record["advantages"] * each.mean(-1)).sum() / 2, gradients)  # two groups
    by_row = dict(zip(record["row_ids"].tolist(), record["advantages"].tolist(), strict=True))
    assert sum(by_row[i] for i in range(4)) == pytest.approx(0, abs=1e-6)


def test_later_batches_count_how_far_the_policy_has_moved(make_trainer: Any) -> None:
    trainer, _ = one_step(make_trainer, DMPOTrainer, num_iterations=2, max_steps=3, alpha=0.5)
    first, again, later = trainer.seen
    assert torch.equal(first["old_scores"].sort().values, again["old_scores"].sort().values)
    assert (later["old_scores"] - later["ref_scores"]).abs().max() > 1e-3
    logs = [entry for entry in trainer.state.log_history if "dmpo/effective_sample_share" in entry]
    assert logs and all(0.25 <= entry["dmpo/effective_sample_share"] <= 1 for entry in logs)


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_an_adapter_is_trained(make_trainer: Any, beta: float) -> None:
    trainer = adapter_step(make_trainer, DMPOTrainer, beta=beta, alpha=0.5)
    assert ("ref_scores" in trainer.seen[0]) == bool(beta)


def test_splitting_a_batch_changes_nothing(make_trainer: Any) -> None:
    check_splits(make_trainer, DMPOTrainer)


# --- the loss on its own ----------------------------------------------------------------------------------------------


def loss_of(
    make_trainer: Any,
    estimates: Tensor,
    old: Tensor,
    weights: Tensor,
    more: dict[str, Tensor] | None = None,
    **settings: Any,
) -> tuple[float, Tensor]:
    """Loss and its gradient by what each view says of a sequence, `[B, K]`; canvases have 8 tokens."""
    values = {"gradient_accumulation_steps": 1, "num_iterations": 1, "beta": 0.0, "per_device_train_batch_size": 4}
    trainer = make_trainer(trainer=DMPOTrainer, config=DMPOConfig, **{**values, **settings})
    rows, views = estimates.shape
    weight = torch.zeros(rows, views, 8)
    weight[:, :, 0] = 1 / views
    log_probs = torch.zeros(rows, views, 8)
    log_probs[:, :, 0] = estimates
    log_probs.requires_grad_()
    batch = {
        "completion_mask": torch.ones(rows, 8),
        "canvas_valid": torch.ones(rows, 8, dtype=torch.bool),
        "advantages": weights,
        "old_scores": old,
        "row_ids": torch.tensor([2, 0, 3, 1]),
        **(more or {}),
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    found = Views(torch.ones(rows, views, 8, dtype=torch.bool), weight)
    loss = trainer.loss(PolicyScores(log_probs.sum(1), torch.zeros(rows, 8), found, log_probs), batch)
    loss.backward()
    return loss.item(), log_probs.grad[:, :, 0]


ESTIMATES = torch.tensor([[-8.0, -4.0], [-2.0, -6.0], [-3.0, -3.0], [-9.0, -1.0]])
WEIGHTS = torch.tensor([0.5, 0.1, 0.3, 0.1])


def test_the_unbiased_baseline_is_the_groups_importance_weights(make_trainer: Any) -> None:
    old = ESTIMATES.mean(-1)
    _, gradient = loss_of(make_trainer, ESTIMATES, old, WEIGHTS, weight_baseline="unbiased")
    expected = -(WEIGHTS - 0.25)[:, None].expand(4, 2) / 8 / 2
    torch.testing.assert_close(gradient, expected, msg="1 / G where nothing has changed")
    gain = torch.tensor([1.0, 0.0, -1.0, 0.5])
    _, gradient = loss_of(make_trainer, ESTIMATES, old - gain, WEIGHTS, weight_baseline="unbiased")
    torch.testing.assert_close(gradient, -(WEIGHTS - gain.softmax(-1))[:, None].expand(4, 2) / 8 / 2)
    # Two groups, rows shuffled: ids 2, 0, 3, 1 are groups 1, 0, 1, 0.
    _, gradient = loss_of(make_trainer, ESTIMATES, old - gain, WEIGHTS, weight_baseline="unbiased", num_generations=2)
    shares = torch.empty(4)
    shares[[0, 2]], shares[[1, 3]] = gain[[0, 2]].softmax(-1), gain[[1, 3]].softmax(-1)
    torch.testing.assert_close(gradient, -(WEIGHTS - shares)[:, None].expand(4, 2) / 8 / 2 / 2)


def test_rows_that_do_not_count_have_no_share_in_the_unbiased_baseline(make_trainer: Any) -> None:
    old = ESTIMATES.mean(-1) - torch.tensor([1.0, 0.0, -1.0, 0.5])
    mask, rewarded = torch.ones(4, 8), torch.tensor([True, True, True, False])
    mask[0] = 0
    more = {"completion_mask": mask, "rewarded": rewarded}
    _, gradient = loss_of(make_trainer, ESTIMATES, old, WEIGHTS, more=more, weight_baseline="unbiased")
    shares = torch.tensor([0.0, 0.0, -1.0, 0.0])
    shares[[1, 2]] = torch.tensor([0.0, -1.0]).softmax(-1)
    expected = -(WEIGHTS - shares)[:, None].expand(4, 2) / 8 / 2
    torch.testing.assert_close(gradient, expected * torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None])
    more = {"completion_mask": torch.zeros(4, 8)}
    loss, gradient = loss_of(make_trainer, ESTIMATES, old, WEIGHTS, more=more, weight_baseline="unbiased")
    assert loss == 0 and not gradient.any()


def test_without_a_reward_neither_term_of_ddo_acts(make_trainer: Any) -> None:
    settings = {"objective": "ddo", "weight_baseline": "none"}
    more = {"rewarded": torch.tensor([True, False, True, True])}
    _, gradient = loss_of(make_trainer, ESTIMATES, ESTIMATES[:, 0], WEIGHTS, more=more, **settings)
    assert not gradient[1].any() and gradient[[0, 2, 3]].all()


def test_replaced_rows_stay_in_their_group(make_trainer: Any) -> None:
    old = ESTIMATES.mean(-1) - (gain := torch.tensor([1.0, 0.0, -1.0, 0.5]))
    more = {"row_ids": torch.tensor([2, 2**23, 3, 1]) + 5 * 2**24}  # an attempt in the place of row 0
    _, gradient = loss_of(
        make_trainer, ESTIMATES, old, WEIGHTS, more=more, weight_baseline="unbiased", num_generations=2
    )
    shares = torch.empty(4)
    shares[[0, 2]], shares[[1, 3]] = gain[[0, 2]].softmax(-1), gain[[1, 3]].softmax(-1)
    torch.testing.assert_close(gradient, -(WEIGHTS - shares)[:, None].expand(4, 2) / 8 / 2 / 2)


def test_what_was_given_is_not_divided_by(make_trainer: Any) -> None:
    hinted = torch.zeros(4, 8, dtype=torch.bool)
    hinted[0, 4:] = True
    more = {"hinted": hinted}
    _, gradient = loss_of(make_trainer, ESTIMATES, ESTIMATES[:, 0], WEIGHTS, more=more, weight_baseline="none")
    sizes = torch.tensor([4.0, 8.0, 8.0, 8.0])
    torch.testing.assert_close(gradient, (-WEIGHTS / sizes)[:, None].expand(4, 2) / 2)


def test_the_loss_is_linear_in_the_weights(make_trainer: Any) -> None:
    losses = [
        loss_of(make_trainer, ESTIMATES, ESTIMATES[:, 0], factor * WEIGHTS, weight_baseline="none")[0]
        for factor in (1.0, 3.0)
    ]
    assert losses[0] == pytest.approx(-(WEIGHTS * ESTIMATES.mean(-1) / 8).sum().item())
    assert losses[1] == pytest.approx(3 * losses[0])


@pytest.mark.parametrize("split", [False, True])
def test_ddo(make_trainer: Any, split: bool) -> None:
    old = torch.tensor([-5.0, -4.0, -4.0, -5.0])
    settings = {"objective": "ddo", "weight_baseline": "none", "ddo_scale": 0.5, "ddo_negative_weight": 2.0}
    loss, _ = loss_of(make_trainer, ESTIMATES, old, WEIGHTS, ddo_split=split, **settings)
    first, second = (ESTIMATES[:, 0], ESTIMATES[:, 1]) if split else (ESTIMATES.mean(-1), ESTIMATES.mean(-1))
    wanted, unwanted = ((first - old) * 0.5).sigmoid().log(), (-(second - old) * 0.5).sigmoid().log()
    assert loss == pytest.approx(-(WEIGHTS * wanted + 2.0 * unwanted).mean().item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.5}, "no policy ratio"),
        ({"loss_type": "bnpo"}, "loss of its own"),
        ({"scale_rewards": "group"}, "set alpha"),
        ({"use_bias_correction_kl": True}, "no KL term"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "set reward_weights"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos=2.0"),
        ({"entropy_target": 0.5}, "entropy_target=0.5"),
        ({"ddo_scale": 0.1}, "no effect with objective='cross_entropy'"),
        ({"weight_baseline": "none", "weight_baseline_strength": 0.5}, "no effect with weight_baseline='none'"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"kappa": 1.5}, "kappa=1.5"),
        ({"beta": 2.0}, "beta=2.0"),
        ({"num_views": 3}, "num_views=3"),
        ({"weight_baseline": "median"}, "weight_baseline='median'"),
        ({"objective": "dpo"}, "objective='dpo'"),
        ({"objective": "ddo"}, "weight_baseline='negative' is not allowed with objective='ddo'"),
        ({"weight_baseline": "unbiased", "gradient_accumulation_steps": 2}, "must see all of them"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
