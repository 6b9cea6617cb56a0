"""LightningRL: who is paid for speed, what is imitated, what its terms are averaged over, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import LightningRLConfig, LightningRLTrainer
from rl4dlm.grading import load_reward
from rl4dlm.models.tiny import tiny_llada
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SETTINGS: dict[str, Any] = {
    "schedule": "threshold",
    "schedule_args": {"threshold": 0.3},
    "denoising_steps": None,
    "min_speed_range": 0.0,
    "advantage_norm": "center",
}
tokens_per_forward = load_reward("speed:tokens_per_forward")


def right(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 3 == 0) for text in completions]


def objective(trainer: Any, record: dict[str, Tensor]) -> Tensor:
    """-A s, averaged over tokens and then completions, less 0.1 times the mean log-probability of right tokens."""
    log_probs, views = plain_log_probs(trainer, record)
    assert views.hidden.shape[1] == 1
    mask = record["completion_mask"]
    scores = (log_probs * views.scored).sum(1)[:, : mask.shape[1]] * mask
    policy = -(record["advantages"] * scores.sum(-1) / mask.sum(-1)).mean()
    imitated = record["correct"][:, None] * mask
    return policy - 0.1 * (scores * imitated).sum() / imitated.sum()


def test_the_first_step_raises_advantages_and_imitates_what_is_right(make_trainer: Any) -> None:
    trainer, gradients = one_step(make_trainer, LightningRLTrainer, rewards=[right, tokens_per_forward], **SETTINGS)
    record = trainer.seen[0]
    assert 0 < int(record["correct"].sum()) < 8
    check_first_iteration(trainer)
    check_gradient(trainer, objective(trainer, record), gradients)
    logs = trainer.state.log_history[0]
    assert logs["lightningrl/correct_share"] == record["correct"].float().mean() and logs["lightningrl/nll"] > 0


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, LightningRLTrainer, rewards=[right, tokens_per_forward], **SETTINGS)


def test_without_likelihood_and_reference_it_is_policy_gradient_on_the_mean_field(make_trainer: Any) -> None:
    """And with one speed for all, advantages are those of correctness; the rows that teach nothing are not scored."""
    settings = {**SETTINGS, "schedule": "low_confidence", "schedule_args": None, "denoising_steps": 4}
    settings |= {"nll_weight": 0.0, "beta": 0.0}
    trainer, gradients = one_step(make_trainer, LightningRLTrainer, rewards=[right, tokens_per_forward], **settings)
    record = trainer.seen[0]
    order = record["row_ids"].argsort()
    correct = record["correct"][order].view(2, 4).double()
    deviation = correct.std(-1, keepdim=True, correction=0)
    expected = torch.where(deviation > 0, (correct - correct.mean(-1, keepdim=True)) / deviation.clamp(min=1e-9), 0.0)
    torch.testing.assert_close(record["advantages"][order].double(), expected.flatten(), rtol=0, atol=1e-6)
    mask = record["completion_mask"]
    scores = plain_log_probs(trainer, record)[0][:, 0, : mask.shape[1]] * mask
    check_gradient(trainer, -(record["advantages"] * scores.sum(-1) / mask.sum(-1)).mean(), gradients)


@pytest.mark.parametrize("gate", ["correct", "none"])
def test_who_earns_most(make_trainer: Any, gate: str) -> None:
    """Two of four are right; a wrong one is by far the fastest."""

    def correct(completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 4 in (0, 1)) for i in range(len(completions))]

    def fast(completions: list[str], **columns: Any) -> list[float]:
        return [[1.0, 1.2, 9.0, 1.1][i % 4] for i in range(len(completions))]

    settings = {**SETTINGS, "speed_reward": "fast", "speed_gate": gate}
    trainer, _ = one_step(make_trainer, LightningRLTrainer, rewards=[correct, fast], **settings)
    record = trainer.seen[0]
    for group in record["row_ids"].argsort().view(2, 4):
        advantages, taught = record["advantages"][group], record["correct"][group]
        assert taught.tolist() == [True, True, False, False], "what is imitated is right, however fast"
        assert int(advantages.argmax()) == (1 if gate == "correct" else 2)
        if gate == "correct":
            assert advantages[2] == advantages[3] < advantages[0]


def test_groups_that_are_left_out_are_neither_scored_nor_imitated(make_trainer: Any) -> None:
    def correct(completions: list[str], **columns: Any) -> list[float]:
        return [float(i == 0 or i in (4, 5)) for i in range(len(completions))]

    def fast(completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 4) if i < 4 else 1.0 for i in range(len(completions))]

    settings = {**SETTINGS, "speed_reward": "fast", "min_speed_range": 0.01, "beta": 0.0}
    trainer, _ = one_step(make_trainer, LightningRLTrainer, rewards=[correct, fast], **settings)
    record = trainer.seen[0]
    first = record["row_ids"] % 8 < 4
    assert record["advantages"][first].any() and not record["advantages"][~first].any()
    assert int(record["correct"].sum()) == 1 and bool(record["correct"][first].any())
    plain = make_trainer(
        trainer=LightningRLTrainer, config=LightningRLConfig, rewards=[correct, fast], **{**settings, "max_steps": 1}
    )
    plain.train()
    logs = plain.state.log_history[0]
    assert logs["lightningrl/kept_group_share"] == 0.5 and logs["diffusion/rows_scored_share"] == 0.5


def test_answers_that_fill_the_canvas_are_wrong_with_a_margin(make_trainer: Any) -> None:
    def everything(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    settings = {**SETTINGS, "cap_margin": 0, "keep_wrong_groups": True}
    trainer, _ = one_step(make_trainer, LightningRLTrainer, rewards=[everything, tokens_per_forward], **settings)
    record = trainer.seen[0]
    assert torch.equal(record["correct"], record["canvas_valid"].sum(-1) < 8)


def test_blocks_are_scored_given_finished_ones(make_trainer: Any) -> None:
    """On a model with blocks: the sum of a block's hidden tokens given the clean blocks before it, in one view."""
    model = tiny_llada()
    model.config.diffusion.update(attention="block_causal", block_length=4)
    trainer, _ = one_step(
        make_trainer, LightningRLTrainer, rewards=[right, tokens_per_forward], model=model, **SETTINGS
    )
    views = trainer.estimator.draw(_rows(trainer), seed=0, iteration=0)
    assert views.hidden.shape[1] == 1 and bool(views.hidden[..., -8:].all())
    assert not views.hidden[..., :-8].any()


def _rows(trainer: Any) -> Any:
    from rl4dlm.training.trainer import rows_of

    return rows_of(trainer.seen[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"speed_gate": "right"}, "speed_gate='right' is not allowed; choose one of correct, none"),
        ({"speed_norm": "rank"}, "speed_norm='rank'"),
        ({"accuracy_norm": "none"}, "accuracy_norm='none'"),
        ({"advantage_norm": "none"}, "advantage_norm='none'"),
        ({"loss_type": "bnpo"}, "loss_type='bnpo' is not allowed; choose one of grpo, dapo"),
        ({"kl_average": "row"}, "kl_average='row'"),
        ({"nll_weight": -1.0}, "nll_weight=-1.0 is not allowed"),
        ({"cap_margin": -1}, "cap_margin=-1 is not allowed"),
        ({"scale_rewards": "group"}, "scale_rewards='group' is not supported: rewards are normalised apart"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation=.*is not supported"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not supported"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        LightningRLConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("rewards", "settings", "said"),
    [
        ([right], {}, "speed_reward='tokens_per_forward' is no reward function; choose one of right, or add speed:"),
        ([tokens_per_forward], {}, "accuracy_reward=None is not allowed with 0 rewards beside that of speed"),
        ([right, tokens_per_forward], {"accuracy_reward": "wrong"}, "accuracy_reward='wrong' is no reward"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(make_trainer: Any, rewards: Any, settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_trainer(trainer=LightningRLTrainer, config=LightningRLConfig, rewards=rewards, **{**SETTINGS, **settings})
