"""UniGRPO: its first step from plain logits, its levels over passes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import UniGRPOConfig, UniGRPOTrainer
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def hidden_mean(trainer: Any, record: dict[str, Any], iteration: int = 0) -> torch.Tensor:
    """-A s, averaged over the hidden tokens of a completion, then over completions."""
    log_probs, views = plain_log_probs(trainer, record, iteration)
    valid = record["canvas_valid"]
    hidden = views.hidden[:, 0, -valid.shape[1] :] & valid
    each = -(record["advantages"][:, None] * log_probs[:, 0] * hidden).sum(-1) / hidden.sum(-1).clamp(min=1)
    return each.mean()


@pytest.mark.parametrize("levels", ["structured", "uniform"])
def test_the_first_step_is_reinforce_on_hidden_tokens(make_trainer: Any, levels: str) -> None:
    trainer, gradients = one_step(make_trainer, UniGRPOTrainer, levels=levels, level_range=[0.3, 0.9])
    check_first_iteration(trainer)
    check_gradient(trainer, hidden_mean(trainer, trainer.seen[0]), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, UniGRPOTrainer, level_range=[0.5, 1.0])


def test_levels_rise_to_a_canvas_that_is_hidden_as_a_whole(make_trainer: Any) -> None:
    trainer, _ = one_step(make_trainer, UniGRPOTrainer, num_iterations=3, learning_rate=0.0, max_steps=3)
    shares = []
    for iteration in range(3):
        _, views = plain_log_probs(trainer, trainer.seen[0], iteration)
        shares.append(views.hidden[:, 0, -8:].double().mean().item())
    assert shares[0] < shares[1] < shares[2] == 1.0
    # Nothing is learnt, so every pass scores as the old policy did, in canvases of its own.
    for record in trainer.seen:
        mask = record["completion_mask"].bool()
        torch.testing.assert_close(record["old_per_token_logps"][mask], record["scores"][mask], rtol=0, atol=2e-6)


def test_completions_without_a_hidden_token_count_for_nothing(make_trainer: Any, losses: Any) -> None:
    trainer, gradients = one_step(make_trainer, UniGRPOTrainer, level_range=[0.0, 0.0])
    assert losses(trainer) == [0.0]
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"levels": "sorted"}, "levels='sorted' is not allowed; choose one of structured, uniform"),
        ({"level_range": [0.5, 0.1]}, "level_range"),
        ({"scope": "all"}, "scope='all'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not allowed: its ratio"),
        ({"loss_type": "dapo"}, "loss_type='dapo' is not allowed; the number of hidden tokens differs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        UniGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
