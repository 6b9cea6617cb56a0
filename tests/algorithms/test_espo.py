"""ESPO: its first step from plain logits, its ratio and KL term, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import ESPOConfig, ESPOTrainer
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, sequences_mean

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("scope", ["canvas", "valid"])
@pytest.mark.parametrize("epsilon", [0.2, 0.0])
def test_the_first_step_raises_bounds_by_advantages_over_length(make_trainer: Any, scope: str, epsilon: float) -> None:
    trainer, gradients = one_step(make_trainer, ESPOTrainer, beta=0.1, scope=scope, epsilon=epsilon)
    check_first_iteration(trainer)
    check_gradient(trainer, sequences_mean(trainer, trainer.seen[0]), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, ESPOTrainer)


@pytest.mark.parametrize("split", [(4, 2), (2, 4)])
def test_splitting_a_batch_changes_nothing(
    make_trainer: Any, losses: Any, split: tuple[int, int], whole: list[float]
) -> None:
    size, accumulation = split
    trainer = make_trainer(
        trainer=ESPOTrainer,
        config=ESPOConfig,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        beta=0.1,
        max_steps=3,
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(whole, abs=2e-6)


@pytest.fixture(scope="module")
def whole(build_trainer: Any, losses: Any, tmp_path_factory: Any) -> list[float]:
    """The losses of steps that take their whole batch at once."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build_trainer(folder, trainer=ESPOTrainer, config=ESPOConfig, beta=0.1, max_steps=3)
    trainer.train()
    found: list[float] = losses(trainer)
    return found


# --- the loss on its own ----------------------------------------------------------------------------------------------


def loss_of(trainer: Any, gaps: torch.Tensor, advantages: list[float], **more: Any) -> tuple[float, torch.Tensor]:
    """Loss and its gradient by scores which are `gaps` [B, C] above those of the old and the reference policy."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    scores = (gaps - 2.0).requires_grad_()
    batch = {
        "completion_mask": torch.ones(gaps.shape, dtype=torch.long),
        "advantages": torch.tensor(advantages, dtype=gaps.dtype),
        "old_per_token_logps": torch.full_like(gaps, -2.0),
        "ref_per_token_logps": torch.full_like(gaps, -2.0),
        **more,
    }
    loss = trainer.loss(PolicyScores(scores, torch.ones_like(gaps)), batch)
    return loss.item(), torch.autograd.grad(loss, scores)[0]


def build(make_trainer: Any, **settings: Any) -> Any:
    return make_trainer(trainer=ESPOTrainer, config=ESPOConfig, **settings)


def test_the_kl_term_is_of_whole_bounds_over_the_length_once(make_trainer: Any) -> None:
    trainer = build(make_trainer, beta=0.5)
    loss, _ = loss_of(trainer, torch.full((2, 8), 0.25), [0.0, 0.0])
    assert loss == pytest.approx(0.5 * 0.5 * (8 * 0.25) ** 2 / 8)
    twice, _ = loss_of(trainer, torch.full((2, 16), 0.25), [0.0, 0.0])
    assert twice == pytest.approx(2 * loss)  # linear in the length


def test_clipping_is_of_sequences_and_on_one_side(make_trainer: Any) -> None:
    trainer = build(make_trainer, beta=0.0, epsilon=0.2)
    gaps = torch.tensor([[0.5, 0.1], [0.5, 0.1], [-0.5, -0.1], [-0.5, -0.1]])  # log ratios of 0.3 and -0.3
    _, gradient = loss_of(trainer, gaps, [1.0, -1.0, 1.0, -1.0])
    high, low = torch.tensor(0.3).exp() / 8, torch.tensor(-0.3).exp() / 8
    expected = torch.stack([torch.zeros(2), high.expand(2), -low.expand(2), torch.zeros(2)])
    torch.testing.assert_close(gradient, expected)
    logged = trainer._metrics["train"]
    assert logged["clip_ratio/high_mean"][-1] == 0.25 and logged["clip_ratio/low_mean"][-1] == 0.25


def test_without_a_clip_range_only_what_got_no_better_is_trained(make_trainer: Any) -> None:
    trainer = build(make_trainer, beta=0.0, epsilon=0.0)
    _, gradient = loss_of(trainer, torch.tensor([[0.1, 0.1], [-0.1, -0.1]]), [1.0, 1.0])
    assert not gradient[0].any() and gradient[1].all()


def test_completions_that_count_for_nothing_are_zeros_of_the_mean(make_trainer: Any) -> None:
    trainer = build(make_trainer, beta=0.5)
    mask = torch.tensor([[1, 1], [0, 0]])
    loss, gradient = loss_of(trainer, torch.full((2, 2), 0.1), [1.0, 1.0], completion_mask=mask)
    alone, _ = loss_of(trainer, torch.full((1, 2), 0.1), [1.0])
    assert loss == pytest.approx(alone / 2)
    assert not gradient[1].any()


def test_what_trl_needs_to_be_off_by_default_may_be_said(tmp_path: Any) -> None:
    common = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    assert ESPOConfig(use_bias_correction_kl=False, delta=1.3, **common).delta == 1.3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_views": 3}, "num_views=3 is not allowed with complement=True"),
        ({"scope": "all"}, "scope='all'"),
        ({"baseline": "median"}, "baseline='median'"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is not allowed; choose one of k1, k2, k3"),
        ({"loss_type": "grpo"}, "loss_type='grpo' is not supported: the loss here is one clipped ratio per sequence"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not supported"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 is not supported"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl=True is not supported"),
        ({"entropy_target": 2.0}, "entropy_target=2.0 is not supported"),
        ({"delta": 1.0}, r"delta=1.0 is not allowed; it must be larger than 1 \+ epsilon_high = 1.2"),
        ({"delta": 1.4, "epsilon_high": 0.5}, r"delta=1.4 is not allowed; .* = 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        ESPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
