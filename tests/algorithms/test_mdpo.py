"""MDPO: what a step is worth, which steps are learnt from, and the loss of whole predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.algorithms.mdpo import MDPOConfig, MDPOTrainer, chosen_steps, step_advantages, step_values
from tests.training.steps import adapter_step, check_splits, one_step, tiny_llada_that_ends

SMALL = {
    "max_completion_length": 8,
    "denoising_steps": 4,
    "temperature": 0.7,
    "score_temperature": 0.7,
    "num_trained_steps": 2,
    "num_iterations": 1,
}


def config(**changes: Any) -> MDPOConfig:
    base = {"output_dir": "x", "bf16": False, "use_cpu": True, "report_to": "none", **SMALL}
    return MDPOConfig(**{**base, **changes})


def test_what_a_step_is_worth():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    found = step_values(rewards)
    assert found[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1, -1])
    assert found[1].tolist() == pytest.approx([2, 1, 1, 1])
    assert found[2].tolist() == pytest.approx([1 / 3, 1 / 2, 1, 2])
    assert step_values(torch.tensor([0.25])).tolist() == [0.5]


def test_advantages_are_of_a_step():
    rewards = torch.tensor([[[0.0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]], dtype=torch.float64)
    values = step_values(rewards)
    expected = (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-4)
    found = step_advantages(rewards)
    assert torch.allclose(found, expected)
    assert torch.allclose(step_advantages(rewards + 0.0), found)
    # Equal completions are worth nothing, also where sums of their rewards have rounding.
    assert not bool(step_advantages(torch.tensor([0.1, 0.3, 0.7, 0.2]).expand(1, 6, 4)).any())
    unknown = rewards.clone()
    unknown[0, 1] = torch.nan
    assert bool(step_advantages(unknown)[0, 1].isnan().all()) and not bool(
        step_advantages(unknown)[0, ::2].isnan().any()
    )
    assert chosen_steps(torch.tensor([[[1.0, -2, 0, 2], [1, 2, 0, -2]]]), 3).tolist() == [[1, 3, 0]]


def canvases(trainer: Any, record: dict[str, Tensor], *, drawn: bool = False) -> tuple[Tensor, Tensor]:
    """Which slots were open, and log-probabilities `[B, K, L]` of the predictions, from the model's plain logits.

    `drawn`: of the distribution that they were drawn from, which has no mask token.
    """
    mask = torch.cat([record["prompt_mask"], torch.ones_like(record["canvas_ids"])], dim=1)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    found = []
    for shown, predicted in zip(record["step_states"].unbind(1), record["step_predictions"].unbind(1), strict=True):
        ids = torch.cat([record["prompt_ids"], shown], dim=1)
        logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -8:] / 0.7
        if drawn:
            logits[..., trainer.spec.mask_token_id] = -torch.inf
        found.append(logits.log_softmax(-1).gather(-1, predicted[..., None]).squeeze(-1))
    return record["step_states"] == trainer.spec.mask_token_id, torch.stack(found, dim=1)


@pytest.mark.parametrize("schedule", ["rcr", "low_confidence"])
@pytest.mark.parametrize("confidence", [True, False])
def test_the_first_gradient(make_trainer: Any, schedule: str, confidence: bool):
    """The loss written out step by step; scores are those that predictions were drawn with."""
    settings = {**SMALL, "schedule": schedule, "beta": 0.0, "confidence_weights": confidence}
    trainer, gradients = one_step(make_trainer, MDPOTrainer, **settings)
    record = trainer.seen[0]
    opened, log_probs = canvases(trainer, record)
    drawn = canvases(trainer, record, drawn=True)[1]
    assert float((record["step_confidence"].log() - drawn)[opened].abs().max()) < 1e-5
    assert not bool(record["step_confidence"][~opened].any())
    assert torch.equal(record["step_states"][~opened], record["step_predictions"][~opened])
    total = log_probs.new_zeros(())
    for row in range(8):
        for step in range(2):
            slots = opened[row, step].nonzero().squeeze(-1).tolist()
            for slot in slots:
                weight = float(record["step_confidence"][row, step, slot]) if confidence else 1.0
                advantage = float(record["prediction_advantages"][row, step])
                total = total - weight * 8 / len(slots) ** 2 * advantage * log_probs[row, step, slot] / 8
    assert float(record["prediction_advantages"].abs().max()) > 0.1
    parameters = dict(trainer.model.named_parameters())
    found = torch.autograd.grad(total, [parameters[name] for name in gradients])
    assert any(gradient.abs().max() > 1e-4 for gradient in found)
    for (name, gradient), expected in zip(gradients.items(), found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6, msg=name)


def test_rewards_are_of_predictions(make_trainer: Any):
    """Reward functions see what each step would have written, at once; the last one's is the completion."""
    asked: list[list[str]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        asked.append(list(completions))
        columns["log_extra"]("seen", completions)
        return [len(set(text)) / 8 for text in completions]

    trainer, _ = one_step(make_trainer, MDPOTrainer, **SMALL, rewards=reward, log_completions=True)
    assert [len(texts) for texts in asked] == [8, 32]
    steps = [asked[1][8 * step : 8 * step + 8] for step in range(4)]
    assert steps[-1] == asked[0] != steps[0]
    assert list(trainer._logs["extra"]["seen"]) == asked[0]  # nothing of the predictions
    rewards = torch.tensor([[len(set(text)) / 8 for text in texts] for texts in steps]).T.view(2, 4, 4)
    advantages = step_advantages(rewards)
    record, chosen = trainer.seen[0], chosen_steps(advantages, 2)
    order = record["row_ids"].argsort()
    expected = torch.stack([advantages[row // 4, row % 4, chosen[row // 4]] for row in range(8)])
    torch.testing.assert_close(record["prediction_advantages"][order].double(), expected, rtol=0, atol=1e-6)
    lost = (rewards.amax(-1) > rewards[..., -1]).double().mean()
    assert trainer.state.log_history[0]["diffusion/lost_answer_share"] == pytest.approx(float(lost), abs=1e-6)
    assert trainer.state.log_history[0]["diffusion/rollout_gap"] < 0.02  # the mask token's share


def test_rows_without_an_advantage_are_not_scored(make_trainer: Any):
    """And nothing changes: loss and gradients are those of scoring all."""
    trainer = make_trainer(trainer=MDPOTrainer, config=MDPOConfig, **{**SMALL, "beta": 0.0, "max_steps": 1})
    trainer.train()
    (batch,) = trainer._buffered_inputs
    batch["prediction_advantages"][::2] = 0.0
    found = []
    for count in (MDPOTrainer.rows_that_count, lambda trainer, batch: None):
        trainer.rows_that_count = count.__get__(trainer)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
    assert trainer._metrics["train"]["diffusion/rows_scored_share"][-1] == 0.5
    for some, everything in zip(*found, strict=True):
        torch.testing.assert_close(some, everything, rtol=1e-5, atol=1e-7)


def test_adapters_passes_and_micro_batches(make_trainer: Any):
    trainer = adapter_step(make_trainer, MDPOTrainer, **{**SMALL, "num_iterations": 2})
    logs = trainer.state.log_history[0]
    assert logs["kl"] == pytest.approx(0, abs=1e-9) and logs["clip_ratio/region_mean"] == 0
    check_splits(make_trainer, MDPOTrainer, **{**SMALL, "num_iterations": 2})


def test_rows_without_an_advantage_have_their_weight_in_a_group(make_trainer: Any):
    def fixed(completions: list[str], **columns: Any) -> list[float]:
        return [(0.0, 0.5, 1.0, 0.5)[place % 4] for place in range(len(completions))]

    class Scored(MDPOTrainer):
        def rows_that_count(self, batch: dict[str, Any]) -> None:
            return None

    weighed = {"clip": "unconditional", "epsilon": 1.0, "epsilon_high": 1e9, "self_normalize": "group"}
    losses = []
    for trainer in (MDPOTrainer, Scored):
        changes = {**SMALL, **weighed, "num_iterations": 2, "max_steps": 2, "beta": 0.0, "learning_rate": 0.01}
        made = make_trainer(
            tiny_llada_that_ends().double(), trainer=trainer, config=MDPOConfig, rewards=fixed, **changes
        )
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_evaluation_has_predictions_too(make_trainer: Any, prompt_dataset: Any):
    trainer = make_trainer(trainer=MDPOTrainer, config=MDPOConfig, **SMALL, eval_dataset=prompt_dataset())
    assert "eval_reward" in trainer.evaluate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 is not allowed with score_temperature=0.7"),
        ({"temperature": 0.0, "score_temperature": 1.0}, "temperature=0.0"),
        ({"num_trained_steps": 0}, "num_trained_steps=0"),
        ({"scale_rewards": "none"}, "scale_rewards='none'"),
        ({"loss_type": "bnpo"}, "loss_type"),
        ({"cache": "dual"}, "cache='dual'"),
    ],
)
def test_a_bad_setting_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_schedules_that_are_refused(make_trainer: Any):
    with pytest.raises(ValueError, match="schedule='daedal' is not allowed"):
        make_trainer(trainer=MDPOTrainer, config=MDPOConfig, **{**SMALL, "schedule": "daedal", "denoising_steps": None})
