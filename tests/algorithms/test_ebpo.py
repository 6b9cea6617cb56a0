"""EBPO: its first step, counts per block, a ratio of whole completions that cannot overflow, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import EBPOConfig, EBPOTrainer
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.training.trainer import PolicyScores, rows_of
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def block_model(origin: str = "response") -> Any:
    model = tiny_llada()
    model.config.diffusion.update(attention="block_causal", block_length=4, grid_origin=origin)
    return model


def test_the_first_step_raises_bounds_by_advantages(make_trainer: Any) -> None:
    """A model without blocks has one, and whole bounds count: no length divides them."""
    trainer, gradients = one_step(make_trainer, EBPOTrainer, beta=0.1, num_views=4, learning_rate=0.1)
    assert not trainer.estimator.per_block
    check_first_iteration(trainer)
    record = trainer.seen[0]
    log_probs, views = plain_log_probs(trainer, record)
    bounds = (log_probs * views.weight.to(log_probs.dtype)).sum((1, 2))
    check_gradient(trainer, -(record["advantages"] * bounds).mean(), gradients)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("origin", ["response", "position_zero"])
def test_blocks_are_those_of_the_attention_and_each_has_something_hidden(
    make_trainer: Any, origin: str, complement: bool
) -> None:
    settings = {"num_views": 4, "complement": complement, "learning_rate": 0.1, "beta": 0.1}
    trainer, gradients = one_step(make_trainer, EBPOTrainer, model=block_model(origin), **settings)
    estimator = trainer.estimator
    assert (estimator.per_block, estimator.block_length, estimator.block_origin) == (True, 4, origin)
    check_first_iteration(trainer)
    record = trainer.seen[0]
    rows = rows_of(record)
    views = estimator.draw(rows, seed=trainer.args.seed, iteration=0)
    if origin == "response":
        first = views.scored[..., :4] | ~rows.valid[:, None, :4]
        assert bool(first.any(-1).all())
        whole = rows.valid[:, :4].all(-1)
        total = views.weight[..., :4].sum((1, 2))
        torch.testing.assert_close(total[whole], torch.full_like(total[whole], 4.0))
    found = score_views(trainer.model, trainer.spec, rows.ids, rows.attention_mask, views)
    bounds = (found.log_probs * views.weight.to(found.log_probs.dtype)).sum((1, 2))
    check_gradient(trainer, -(record["advantages"] * bounds).mean(), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, EBPOTrainer, beta=0.04, num_views=2, model=block_model(), learning_rate=0.1)


# --- the loss on its own ----------------------------------------------------------------------------------------------


def loss_of(trainer: Any, gaps: torch.Tensor, advantages: list[float]) -> tuple[float, torch.Tensor]:
    """Loss and its gradient by scores which are `gaps` [B, C] above those of the old and the reference policy."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    scores = (gaps - 2.0).requires_grad_()
    batch = {
        "completion_mask": torch.ones(gaps.shape, dtype=torch.long),
        "advantages": torch.tensor(advantages, dtype=gaps.dtype),
        "old_per_token_logps": torch.full_like(gaps, -2.0),
        "ref_per_token_logps": torch.full_like(gaps, -2.0),
        "row_ids": torch.arange(len(gaps)),
    }
    loss = trainer.loss(PolicyScores(scores, torch.ones_like(gaps)), batch)
    return loss.item(), torch.autograd.grad(loss, scores)[0]


def test_ratio_and_divergence_are_of_whole_completions_or_per_token(make_trainer: Any) -> None:
    gaps = torch.full((1, 4), 0.025)
    for norm, exponent, divergence in (("none", 0.1, 0.005), ("length", 0.025, 0.005 / 4)):
        trainer = make_trainer(trainer=EBPOTrainer, config=EBPOConfig, beta=0.5, ratio_norm=norm)
        loss, _ = loss_of(trainer, gaps, [1.0])
        assert loss == pytest.approx(-torch.tensor(exponent).exp().item() + 0.5 * divergence, abs=1e-6)


def test_nothing_overflows_where_it_is_clipped(make_trainer: Any) -> None:
    trainer = make_trainer(trainer=EBPOTrainer, config=EBPOConfig, epsilon=0.2, epsilon_high=0.3)
    far = torch.tensor([[500.0, 500.0], [-500.0, -500.0]])
    loss, gradient = loss_of(trainer, far, [1.0, -1.0])
    assert loss == pytest.approx((-1.3 + 0.8) / 2) and not gradient.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_views": 3, "complement": True}, "num_views=3 is not allowed with complement=True"),
        ({"stratify": "blocks"}, "stratify='blocks'"),
        ({"ratio_norm": "tokens"}, "ratio_norm='tokens' is not allowed; choose one of length, none"),
        ({"clip": "both"}, "clip='both' is not allowed"),
        ({"loss_type": "grpo"}, "loss_type='grpo' is not supported: the loss here is one clipped ratio per sequence"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        EBPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
