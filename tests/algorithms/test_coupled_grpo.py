"""coupled-GRPO: its first step from plain logits, its baselines, what its views reduce to, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import CoupledGRPOConfig, CoupledGRPOTrainer
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.training.advantages import leave_one_out, scaled
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, tokens_mean

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_the_first_step_is_reinforce_with_coupled_scores(make_trainer: Any) -> None:
    trainer, gradients = one_step(make_trainer, CoupledGRPOTrainer)
    check_first_iteration(trainer)
    check_gradient(trainer, tokens_mean(trainer, trainer.seen[0]), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, CoupledGRPOTrainer)


def test_without_pairs_it_is_diffu_grpo_without_prompt_masking(make_trainer: Any, losses: Any) -> None:
    settings = {"beta": 0.04, "epsilon": 0.5, "temperature": 1.0, "top_p": 1.0}
    coupled = make_trainer(trainer=CoupledGRPOTrainer, config=CoupledGRPOConfig, pairs=0, **settings)
    plain = make_trainer(p_mask_prompt=0.0, **settings)
    assert isinstance(plain.estimator, MeanField)
    coupled.train()
    plain.train()
    assert losses(coupled) == pytest.approx(losses(plain), abs=1e-7)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_advantages_are_rewards_above_the_baseline(make_trainer: Any, baseline: str) -> None:
    trainer, _ = one_step(
        make_trainer,
        CoupledGRPOTrainer,
        baseline=baseline,
        rewards=lambda completions, **_: [float(i) ** 2 for i in range(len(completions))],
    )
    record = trainer.seen[0]
    found = record["advantages"][record["row_ids"].argsort()].view(-1, 4)
    rewards = torch.arange(8).double().square().view(-1, 4)
    others = (rewards.sum(-1, keepdim=True) - rewards) / 3
    expected = rewards - (others if baseline == "leave_one_out" else rewards.mean(-1, keepdim=True))
    torch.testing.assert_close(found.double(), expected)


def test_leaving_one_out_scales_the_distance_from_the_mean() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, torch.nan], [0.25, torch.nan, torch.nan, torch.nan]])
    advantages = leave_one_out(rewards)
    torch.testing.assert_close(advantages[0, :3], 3 / 2 * (rewards[0, :3] - 0.5))
    assert advantages[1, 0] == 0 and advantages.isnan().sum() == 4
    # A baseline does not depend on the reward that it is compared with.
    base = rewards[0, 0] - advantages[0, 0]
    rewards[0, 0] = 7.0
    assert rewards[0, 0] - leave_one_out(rewards)[0, 0] == base
    torch.testing.assert_close(
        scaled(leave_one_out(rewards), rewards, "group")[0, :3],
        leave_one_out(rewards)[0, :3] / (rewards[0, :3].std() + 1e-4),
    )
    assert scaled(rewards, rewards, "none") is rewards


def test_without_pairs_scores_add_up_to_sequences(tmp_path: Any) -> None:
    level = {"importance_sampling_level": "sequence"}
    assert CoupledGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, pairs=0, **level).pairs == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pairs": -1}, "pairs=-1"),
        ({"level_range": [0.0, 0.5]}, "level_range"),
        (
            {"pairs": 0, "level_range": [0.1, 0.9]},
            r"level_range=.* is not supported: it has no effect with pairs=0",
        ),
        ({"eos_penalty_decay": True}, "eos_penalty_decay=True has no effect with eos_penalty=0"),
        ({"scope": "canvas", "stop_at_eos": True}, "scope='canvas' is not allowed with stop_at_eos=True"),
        ({"delta": 1.2}, "delta=1.2 is not allowed; it must be larger than 1 . epsilon_high = 1.5"),
        ({"scope": "all"}, "scope='all' is not allowed; choose one of valid, canvas"),
        ({"baseline": "median"}, "baseline='median' is not allowed; choose one of group_mean, leave_one_out"),
        (
            {"baseline": "leave_one_out", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum'.*baseline='leave_one_out'",
        ),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not allowed: its ratio"),
        ({"loss_type": "vespo"}, "loss_type='vespo' is not allowed: its ratio is one of whole sequences"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        CoupledGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
