"""BGPO: its first step from plain logits, its bounds of the ratio, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import BGPOConfig, BGPOTrainer
from rl4dlm.likelihood.views import Views
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import adapter_step, check_gradient, check_splits, one_step, sequences_mean

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def one_bgpo_step(make_trainer: Any, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    return one_step(make_trainer, BGPOTrainer, num_views=4, beta=0.1, **settings)


def check_ratios(trainer: Any) -> None:
    record, logs = trainer.seen[0], trainer.state.log_history[0]
    assert record["old_per_token_logps"].shape == (8, 4), "one number per view"
    torch.testing.assert_close(record["old_per_token_logps"], record["ref_per_token_logps"], rtol=0, atol=2e-5)
    assert logs["clip_ratio/region_mean"] == 0 and logs["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("one_view", [False, True])
def test_the_first_step_raises_bounds_by_advantages(make_trainer: Any, one_view: bool) -> None:
    trainer, gradients = one_bgpo_step(make_trainer, one_view=one_view)
    check_ratios(trainer)
    check_gradient(trainer, sequences_mean(trainer, trainer.seen[0]), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    check_ratios(adapter_step(make_trainer, BGPOTrainer, num_views=4, beta=0.1))


def test_splitting_a_batch_changes_nothing(make_trainer: Any) -> None:
    check_splits(make_trainer, BGPOTrainer, num_views=2)


def test_the_loss_bounds_that_of_the_exact_ratio_and_is_clipped_per_view(make_trainer: Any) -> None:
    gaps = torch.tensor([[0.4, -0.1, 0.0], [0.4, -0.5, 0.1], [-3.0, 0.0, 0.0]], requires_grad=True)  # per token
    advantages = torch.tensor([1.0, -1.0, 1.0])
    loss, _ = loss_of(make_trainer, gaps, advantages, epsilon=100.0)
    d = gaps.detach()
    each = -advantages[:, None] * torch.stack([1 + d[0], d[1].exp(), 1 + d[2]])  # 1 + d may be negative
    assert loss == pytest.approx(each.mean().item(), abs=1e-6)
    assert loss >= -(advantages * d.mean(-1).exp()).mean().item()
    _, gradient = loss_of(make_trainer, gaps, advantages, epsilon=0.2)
    expected = torch.tensor([[0.0, -1.0, -1.0], [1.0, 0.0, 1.0], [-1.0, -1.0, -1.0]]) / 9
    expected[1] = expected[1] * d[1].exp()
    torch.testing.assert_close(gradient, expected)
    _, gradient = loss_of(make_trainer, gaps, advantages, epsilon=0.2, delta=1.3)
    expected[1, 0] = 0.0  # exp(0.4) is above 1.3
    torch.testing.assert_close(gradient, expected)


def test_what_was_given_is_in_no_bound_and_no_length(make_trainer: Any) -> None:
    gaps = torch.tensor([[0.4, -0.1, 0.0], [0.2, 0.0, 0.1]], requires_grad=True)
    hinted = torch.zeros(2, 8, dtype=torch.bool)
    hinted[0, 4:] = True
    loss, gradient = loss_of(make_trainer, gaps, torch.tensor([1.0, -1.0]), hinted=hinted, epsilon=100.0)
    d = gaps.detach() * torch.tensor([[2.0], [1.0]])  # half of the tokens of the first row are left to divide by
    assert loss == pytest.approx(torch.stack([-(1 + d[0]), d[1].exp()]).mean().item(), abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-2 / 6] * 3)


def test_f4_bounds_are_over_tokens_or_over_the_canvas(make_trainer: Any) -> None:
    # Two of eight tokens are valid: over the canvas bounds are a quarter, and so is what a token weighs.
    gaps = torch.tensor([[0.4, -0.1, 0.2]], requires_grad=True)
    valid = (torch.arange(8) < 2)[None]
    each = {}
    for norm in ("tokens", "canvas"):
        each[norm] = loss_of(make_trainer, gaps, torch.ones(1), valid=valid, epsilon=100.0, bound_norm=norm)
        size = 2 if norm == "tokens" else 8
        assert each[norm][0] == pytest.approx(-(1 + 8 / size * gaps.detach()).mean().item(), abs=1e-5)
    torch.testing.assert_close(each["tokens"][1], 4 * each["canvas"][1])


def test_only_completions_that_count_are_in_metrics_and_loss(make_trainer: Any) -> None:
    gaps = torch.tensor([[0.4, -0.1, 0.0], [0.6, 0.5, 0.7]], requires_grad=True)
    mask = torch.tensor([[1.0], [0.0]]).expand(2, 8)
    metrics: dict[str, Any] = {}
    loss, gradient = loss_of(make_trainer, gaps, torch.ones(2), mask=mask, metrics=metrics, epsilon=0.3)
    assert loss == pytest.approx(-(1.3 + 0.9 + 1.0) / 6) and not gradient[1].any()
    assert metrics["clip_ratio/region_mean"] == [pytest.approx(1 / 3)]


def loss_of(
    make_trainer: Any,
    gaps: Tensor,
    advantages: Tensor,
    hinted: Tensor | None = None,
    mask: Tensor | None = None,
    metrics: dict[str, Any] | None = None,
    valid: Tensor | None = None,
    **settings: Any,
) -> tuple[float, Tensor]:
    """Loss and its gradient by `gaps` `[B, K]`: each view's score per token above that of the old policy."""
    trainer = make_trainer(trainer=BGPOTrainer, config=BGPOConfig, num_views=3, **settings)
    rows, views = gaps.shape
    weight = torch.zeros(rows, views, 8)
    weight[:, :, 0] = 8 / views  # as if one of eight tokens were hidden
    log_probs = torch.nn.functional.pad((gaps - 2.0)[..., None], (0, 7))
    batch = {
        "completion_mask": torch.ones(rows, 8) if mask is None else mask,
        "canvas_ids": torch.full((rows, 8), 9),
        "canvas_valid": torch.ones(rows, 8, dtype=torch.bool) if valid is None else valid,
        "advantages": advantages,
        "old_per_token_logps": torch.full((rows, views), -2.0 * 8),
    }
    if hinted is not None:
        batch["hinted"] = hinted
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    found = Views(torch.ones(rows, views, 8, dtype=torch.bool), weight)
    loss = trainer.loss(PolicyScores(log_probs.sum(1), torch.zeros(rows, 8), found, log_probs), batch)
    if metrics is not None:
        metrics.update(trainer._metrics["train"])
    return loss.item(), torch.autograd.grad(loss, gaps)[0]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("loss_type", "bnpo", "loss of its own"),
        ("importance_sampling_level", "sequence", "one clipped bound per view of a whole sequence already"),
        ("use_bias_correction_kl", True, "the KL term is per view"),
        ("vespo_k_pos", 3.0, "vespo_k_pos=3.0"),
        ("delta", 1.0, r"delta=1.0 is not allowed; it must be larger than 1 \+ epsilon_high = 1.2"),
        ("entropy_coef", 0.1, "no entropy term"),
        ("kl_estimator", "k4", "k4"),
        ("bound_norm", "batch", "bound_norm='batch' is not allowed; choose one of tokens, canvas"),
        ("num_views", 0, "num_views=0"),
        ("stratify", "all", "stratify='all'"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Any, setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BGPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **{setting: value})
