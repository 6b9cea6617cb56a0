"""wd1: its weights, its first step from plain logits, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rl4dlm import WD1Config, WD1Trainer
from rl4dlm.algorithms.wd1 import signed_weights
from tests.training.steps import (
    adapter_step,
    check_gradient,
    check_splits,
    one_step,
    plain_log_probs,
    tiny_llada_that_ends,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

REWARDS = torch.tensor([[0.0, 1.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5]])


def test_weights_add_up_to_nothing_and_are_antisymmetric() -> None:
    weights = signed_weights(REWARDS, psi=3.0)
    torch.testing.assert_close(weights.sum(-1), torch.zeros(2).double())
    torch.testing.assert_close(signed_weights(-REWARDS, psi=3.0), -weights)
    torch.testing.assert_close(signed_weights(REWARDS + 7, psi=3.0), weights)
    assert not weights[1].any(), "equal rewards"
    pair = signed_weights(torch.tensor([[2.0, 0.5]]), psi=0.8)
    assert pair[0, 0].item() == pytest.approx(math.tanh(0.8 * 1.5 / 2))


def test_small_and_large_psi() -> None:
    psi = 1e-4
    centred = (REWARDS - REWARDS.mean(-1, keepdim=True)).double()
    torch.testing.assert_close(signed_weights(REWARDS, psi), 2 * psi / 4 * centred, rtol=0, atol=1e-11)
    largest = signed_weights(REWARDS[:1], psi=1e4)
    torch.testing.assert_close(largest, torch.tensor([[-1.0, 0.5, 0.0, 0.5]]).double())


def test_a_completion_without_reward_has_no_weight() -> None:
    weights = signed_weights(torch.tensor([[1.0, math.nan, 0.0], [math.nan] * 3]), psi=1.0)
    assert weights[0, 1] == 0 and weights[0, 0] == pytest.approx(math.tanh(0.5)) and not weights[1].any()


def test_a_softmax_over_the_batch() -> None:
    groups = signed_weights(REWARDS, psi=2.0, negative_weight=0.0, over="batch")
    assert groups.sum().item() == pytest.approx(2.0)
    assert groups[1].sum().item() < 1 < groups[0].sum().item()


@pytest.mark.parametrize(("negative_weight", "scope"), [(1.0, "valid"), (0.0, "canvas")])
def test_the_first_step_is_the_weighted_likelihood(make_trainer: Any, negative_weight: float, scope: str) -> None:
    trainer, gradients = one_step(
        make_trainer,
        WD1Trainer,
        model=tiny_llada_that_ends(),
        negative_weight=negative_weight,
        psi=2.0,
        scope=scope,
        stop_at_eos=scope == "valid",
    )
    assert 0 < trainer.state.log_history[0]["entropy"] < math.log(len(trainer.processing_class))
    record = trainer.seen[0]
    assert not {"old_per_token_logps", "ref_per_token_logps"} & record.keys()
    log_probs, views = plain_log_probs(trainer, record)
    assert views.hidden[..., -8:].all(), "all of a completion is hidden"
    assert not record["canvas_valid"].all(), "completions end early"
    scores = (log_probs[:, 0] * (record["canvas_valid"] if scope == "valid" else 1)).sum(-1)
    check_gradient(trainer, -(record["advantages"] * scores).sum() / 2, gradients)  # two groups


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    adapter_step(make_trainer, WD1Trainer)


def test_equal_rewards_change_nothing(make_trainer: Any) -> None:
    _, gradients = one_step(make_trainer, WD1Trainer, rewards=lambda completions, **_: [1.0] * len(completions))
    assert not any(gradient.any() for gradient in gradients.values())


def test_splitting_a_batch_changes_nothing(make_trainer: Any) -> None:
    check_splits(make_trainer, WD1Trainer)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("beta", 0.04, "no KL term"),
        ("epsilon", 0.5, "no policy ratio"),
        ("loss_type", "bnpo", "loss of its own"),
        ("use_bias_correction_kl", True, "use_bias_correction_kl=True is not supported"),
        ("sapo_temperature_pos", 2.0, "sapo_temperature_pos=2.0 is not supported"),
        ("vespo_k_neg", 1.5, "vespo_k_neg=1.5 is not supported"),
        ("entropy_target", 2.0, "entropy_target=2.0 is not supported"),
        ("scale_rewards", "group", "set psi"),
        ("multi_objective_aggregation", "normalize_then_sum", "set reward_weights"),
        ("scope", "all", "scope='all'"),
        ("psi", 0.0, "psi=0.0"),
        ("negative_weight", -1.0, "negative_weight=-1.0"),
        ("weights_over", "device", "weights_over='device'"),
        ("p_mask_prompt", 1.5, "p_mask_prompt=1.5"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Any, setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WD1Config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **{setting: value})


def test_what_the_loss_does_without_may_be_switched_off(tmp_path: Any) -> None:
    assert not WD1Config(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, use_bias_correction_kl=False
    ).use_bias_correction_kl
