"""GDPO: its first step from plain logits, its two ratios, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import DiffusionGDPOConfig, DiffusionGDPOTrainer
from rl4dlm.likelihood.views import Views
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, sequences_mean

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize(("ratio_norm", "masks"), [("length", "bernoulli"), ("none", "count")])
def test_the_first_step_raises_bounds_by_advantages_over_length(make_trainer: Any, ratio_norm: str, masks: str) -> None:
    trainer, gradients = one_step(make_trainer, DiffusionGDPOTrainer, beta=0.1, ratio_norm=ratio_norm, masks=masks)
    check_first_iteration(trainer)
    check_gradient(trainer, sequences_mean(trainer, trainer.seen[0]), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, DiffusionGDPOTrainer, beta=0.1)


def test_the_entropy_is_that_of_tokens_that_some_view_scores(make_trainer: Any) -> None:
    trainer = make_trainer(trainer=DiffusionGDPOTrainer, config=DiffusionGDPOConfig, nodes=2)
    trainer.model.train()
    weight = torch.tensor([[[0.0, 1.5, 0.0, 0.0], [0.0, 0.5, 2.0, 0.0]], [[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 9.0]]])
    views = Views(torch.ones(2, 2, 6, dtype=torch.bool), weight)
    entropies = torch.tensor([[0.0, 1.0, 2.0, 0.0], [6.0, 0.0, 0.0, 100.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    trainer.log_entropy(PolicyScores(entropies, entropies, views), mask)
    assert trainer._metrics["train"]["entropy"] == [3.0]  # of three tokens, not of seven


@pytest.mark.parametrize("ratio_norm", ["length", "none"])
def test_the_exponent_of_the_ratio_is_per_token_or_whole(make_trainer: Any, ratio_norm: str) -> None:
    trainer = make_trainer(
        trainer=DiffusionGDPOTrainer, config=DiffusionGDPOConfig, ratio_norm=ratio_norm, epsilon=0.9, beta=0.0
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    scores = torch.full((2, 4), -1.9)
    batch = {
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": torch.full((2, 4), -2.0),
    }
    loss = trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch).item()
    gaps, lengths = torch.tensor([0.4, 0.2]), torch.tensor([4.0, 2.0])
    ratio = (gaps / lengths).exp() if ratio_norm == "length" else gaps.exp() / lengths
    assert loss == pytest.approx((-ratio * batch["advantages"]).mean().item(), abs=1e-6)


def test_rewards_may_be_normalised_one_by_one(make_trainer: Any) -> None:
    # NVIDIA's method of the same name is an advantage, and goes with this one.
    trainer, _ = one_step(
        make_trainer,
        DiffusionGDPOTrainer,
        multi_objective_aggregation="normalize_then_sum",
        rewards=[
            lambda completions, **_: [float(i % 4) for i in range(len(completions))],
            lambda completions, **_: [100.0 * (i % 2) for i in range(len(completions))],
        ],
    )
    record = trainer.seen[0]
    found = record["advantages"][record["row_ids"].argsort()].view(-1, 4).double()
    first, second = torch.arange(4.0).double(), torch.tensor([0.0, 100.0, 0.0, 100.0]).double()
    each = [(r - r.mean()) / (r.std() + 1e-4) for r in (first, second)]
    total = (each[0] + each[1]).repeat(2)
    torch.testing.assert_close(found.flatten(), total / (total.std() + 1e-4), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"masks": "uniform"}, "masks='uniform' is not allowed; choose one of bernoulli, count"),
        ({"weight": "count"}, "weight='count' is not allowed with masks='bernoulli'"),
        ({"ratio_norm": "mean"}, "ratio_norm='mean' is not allowed; choose one of length, none"),
        ({"loss_type": "bnpo"}, "loss_type='bnpo' is not supported"),
        ({"delta": 1.5}, r"delta=1.5 is not allowed; it must be larger than 1 \+ epsilon_high = 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        DiffusionGDPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
