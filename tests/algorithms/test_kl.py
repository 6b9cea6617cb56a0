"""KL terms: k3 to the reference is TRL's own; other estimators, and the old policy, are averaged in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import (
    BGPOConfig,
    BGPOTrainer,
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DreamCoderRLConfig,
    DreamCoderRLTrainer,
    ESPOConfig,
    ESPOTrainer,
    SPGConfig,
)
from rl4dlm.algorithms.base import PolicyScores
from rl4dlm.objectives import kl_estimate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROWS, WIDTH = 3, 5


def batch_of_scores() -> tuple[Tensor, dict[str, Any]]:
    """Scores with a gradient, and a batch in which current, old and reference policy differ and rows end early."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(ROWS, WIDTH, dtype=torch.long)
    mask[1, 3:], mask[2, 1:] = 0, 0
    current = (0.3 * drawn(ROWS, WIDTH) - 2).requires_grad_()
    return current, {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, WIDTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": drawn(ROWS),
        "old_per_token_logps": current.detach() + 0.2 * drawn(ROWS, WIDTH),
        "ref_per_token_logps": current.detach() + 0.5 * drawn(ROWS, WIDTH),
        "num_items_in_batch": torch.tensor(20.0),
    }


def loss_and_gradient(trainer: Any) -> tuple[Tensor, Tensor]:
    current, batch = batch_of_scores()
    loss = trainer.loss(PolicyScores(current, torch.zeros_like(current)), batch)
    return loss.detach(), torch.autograd.grad(loss, current)[0]


@pytest.fixture
def make(make_trainer: Any) -> Any:
    """A diffu-GRPO trainer in training mode, two micro-batches per step."""

    def build(**settings: Any) -> Any:
        trainer = make_trainer(trainer=DiffuGRPOTrainer, gradient_accumulation_steps=2, **settings)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2
        return trainer

    return build


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_terms_are_averaged_as_trl_averages_its_own(make: Any, loss_type: str, corrected: bool, level: str) -> None:
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "use_bias_correction_kl": corrected}
    trainer = make(beta=0.5, **settings)
    trls = loss_and_gradient(trainer)
    metric = trainer._metrics["train"]["kl"][-1]
    trainer.beta = trainer.args.beta = 0.0
    without = loss_and_gradient(trainer)
    current, batch = batch_of_scores()
    term = 0.5 * trainer.token_kl(current, batch)
    torch.testing.assert_close(without[0] + term.detach(), trls[0])
    torch.testing.assert_close(without[1] + torch.autograd.grad(term, current)[0], trls[1])
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(metric)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("target", ["reference", "old"])
def test_estimators_and_targets(make: Any, kind: str, target: str) -> None:
    plain = loss_and_gradient(make(beta=0.0))
    trainer = make(beta=0.5, kl_estimator=kind, kl_target=target)
    loss, gradient = loss_and_gradient(trainer)
    current, batch = batch_of_scores()
    other = batch["ref_per_token_logps" if target == "reference" else "old_per_token_logps"]
    mask = batch["completion_mask"]
    estimates = kl_estimate(current - other, kind) * mask
    expected = 0.5 * estimates.sum() / 20  # "dapo"; both micro-batches of a step are of the same generation batch
    torch.testing.assert_close(loss - plain[0], expected.detach())
    torch.testing.assert_close(gradient - plain[1], torch.autograd.grad(expected, current)[0])
    mean = (estimates.sum() / mask.sum()).item()
    assert trainer._metrics["train"]["kl"] == [pytest.approx(mean)]
    assert trainer.beta == (0.5 if target == "reference" else 0.0)


def test_the_old_policy_needs_no_reference_model_and_counts_from_the_second_pass_on(make_trainer: Any) -> None:
    trainer = make_trainer(trainer=DiffuGRPOTrainer, beta=0.5, kl_estimator="k2", kl_target="old", max_steps=4)
    assert trainer.ref_model is None
    trainer.train()
    measured = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert measured[0] == measured[2] == 0 and measured[1] > 0 and measured[3] > 0


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_sequences_compare_with_the_old_policy(make_trainer: Any, kind: str) -> None:
    trainer = make_trainer(trainer=ESPOTrainer, config=ESPOConfig, beta=0.5, kl_estimator=kind, kl_target="old")
    assert trainer.ref_model is None
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    current, batch = batch_of_scores()
    batch["advantages"] = torch.zeros(ROWS, dtype=torch.float64)
    loss = trainer.loss(PolicyScores(current, torch.zeros_like(current)), batch)
    mask = batch["completion_mask"]
    difference = ((current - batch["old_per_token_logps"]) * mask).sum(-1)
    torch.testing.assert_close(loss, 0.5 * (kl_estimate(difference, kind) / mask.sum(-1)).mean())


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ((BGPOTrainer, BGPOConfig), {"num_views": 2}),
        ((DreamCoderRLTrainer, DreamCoderRLConfig), {"kl_estimator": "k2"}),
    ],
)
def test_views_and_weighted_tokens_compare_with_the_old_policy(
    make_trainer: Any, algorithm: tuple[type, type], settings: dict[str, Any]
) -> None:
    settings = {"beta": 0.5, "kl_target": "old", "num_iterations": 2, "max_steps": 2, **settings}
    trainer = make_trainer(trainer=algorithm[0], config=algorithm[1], **settings)
    assert trainer.ref_model is None
    trainer.train()
    measured = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert measured[0] == 0 and measured[1] > 0


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (DiffuGRPOConfig, {"kl_estimator": "k4"}, "kl_estimator='k4' is not allowed; choose one of k1, k2, k3"),
        (BGPOConfig, {"kl_target": "base"}, "kl_target='base' is not allowed; choose one of reference, old"),
        (DiffuGRPOConfig, {"kl_target": "old", "num_iterations": 1}, "kl_target='old' has no effect with num_iter"),
        (ESPOConfig, {"kl_target": "old", "sync_ref_model": True}, "sync_ref_model=True is not allowed with kl_target"),
        (SPGConfig, {"kl_estimator": "k2"}, "kl_estimator='k2' is not supported: the loss has no KL term"),
        (SPGConfig, {"kl_target": "old"}, "kl_target='old' is not supported: the loss has no KL term"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Any, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_a_batch_that_is_used_in_several_steps_has_an_old_policy(tmp_path: Path) -> None:
    settings = {"num_iterations": 1, "steps_per_generation": 2, "kl_target": "old"}
    config = DiffuGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert config.kl_target == "old" and config.beta > 0
