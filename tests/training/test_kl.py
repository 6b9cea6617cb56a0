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
    DiffusionGDPOConfig,
    DiffusionGDPOTrainer,
    DMPOConfig,
    DreamCoderRLConfig,
    DreamCoderRLTrainer,
    ESPOConfig,
    ESPOTrainer,
    SPGConfig,
)
from rl4dlm.training.losses import kl_estimate
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import adapter_step, check_splits

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
    estimates, mask = trainer.token_kl(current, batch), batch["completion_mask"]
    term = 0.5 * trainer.averaged(estimates, mask, batch)
    torch.testing.assert_close(without[0] + term.detach(), trls[0])
    torch.testing.assert_close(without[1] + torch.autograd.grad(term, current)[0], trls[1])
    trainer.log_mean("kl", estimates, mask)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(metric)] * 2


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("target", ["reference", "old"])
def test_estimators_and_targets(make: Any, kind: str, target: str) -> None:
    plain = loss_and_gradient(make(beta=0.0))
    trainer = make(beta=0.5, kl_estimator=kind, kl_target=target, use_bias_correction_kl=kind == "k1")
    loss, gradient = loss_and_gradient(trainer)
    current, batch = batch_of_scores()
    other = batch["ref_per_token_logps" if target == "reference" else "old_per_token_logps"]
    mask = batch["completion_mask"]
    ratio = (current - batch["old_per_token_logps"]).exp() if kind == "k1" else 1.0
    estimates = ratio * kl_estimate(current - other, kind) * mask
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


def test_the_reference_is_not_silently_the_old_policy(make: Any) -> None:
    trainer = make(beta=0.5, kl_estimator="k2")
    current, batch = batch_of_scores()
    del batch["ref_per_token_logps"]
    with pytest.raises(KeyError, match="ref_per_token_logps"):
        trainer.loss(PolicyScores(current, torch.zeros_like(current)), batch)


@pytest.mark.parametrize("settings", [{"kl_estimator": "k2"}, {"kl_target": "old"}])
def test_splitting_a_batch_changes_nothing(make_trainer: Any, settings: dict[str, Any]) -> None:
    check_splits(make_trainer, DiffuGRPOTrainer, beta=0.5, num_iterations=3, **settings)


def test_an_adapter_is_compared_with_what_it_was(make_trainer: Any) -> None:
    trainer = adapter_step(make_trainer, DiffuGRPOTrainer, beta=0.5, kl_target="old", max_steps=2)
    assert "ref" not in trainer.model.peft_config
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert first == 0 and second > 0


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("trainer", [ESPOTrainer, DiffusionGDPOTrainer])
def test_f7_the_gradient_of_a_sequences_term_depends_on_the_reference(
    make_trainer: Any, trainer: Any, kind: str
) -> None:
    built = make_trainer(trainer=trainer, config=trainer.config_class, beta=0.5, kl_estimator=kind)
    built.model.train()
    built.current_gradient_accumulation_steps = 1

    def gradient(moved: float) -> Tensor:
        current, batch = batch_of_scores()
        batch["ref_per_token_logps"] = batch["ref_per_token_logps"] + moved
        loss = built.loss(PolicyScores(current, torch.zeros_like(current)), batch)
        return torch.autograd.grad(loss, current)[0]

    still = gradient(0.0)
    assert (gradient(0.3) - still).norm() > 0.05 * still.norm()


@pytest.mark.parametrize("kind", ["k2", "k3"])
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
        (
            DiffuGRPOConfig,  # both passes are one optimizer step
            {"kl_target": "old", "num_iterations": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 2},
            "kl_target='old' has no effect with .* gradient_accumulation_steps=2",
        ),
        (DiffuGRPOConfig, {"kl_estimator": "k1"}, "kl_estimator='k1' is not allowed here.*use_bias_correction_kl=True"),
        (ESPOConfig, {"kl_estimator": "k1", "kl_target": "old"}, "does not depend on the old policy.*choose k2 or k3"),
        # F7: of whole sequences and views, too.
        (ESPOConfig, {"kl_estimator": "k1"}, "kl_estimator='k1' .*not depend on the reference policy.*choose k2 or k3"),
        (DiffusionGDPOConfig, {"kl_estimator": "k1", "beta": 0.1}, "not depend on the reference policy.*k2 or k3"),
        (BGPOConfig, {"kl_estimator": "k1", "beta": 0.1}, "not depend on the reference policy.*choose k2 or k3"),
        (
            DiffuGRPOConfig,
            {"kl_estimator": "k2", "use_bias_correction_kl": True},
            "use_bias_correction_kl=True is not allowed with kl_estimator='k2'",
        ),
        (BGPOConfig, {"kl_target": "old"}, "kl_target='old' is not supported: there is no KL term at beta=0"),
        (DMPOConfig, {"kl_target": "old", "num_iterations": 1}, "there is no KL term; beta is a share in the weights"),
        (ESPOConfig, {"kl_target": "old", "sync_ref_model": True}, "sync_ref_model=True is not allowed with kl_target"),
        (SPGConfig, {"kl_estimator": "k2"}, "kl_estimator='k2' is not supported: the loss has no KL term"),
        (SPGConfig, {"kl_target": "old"}, "kl_target='old' is not supported: the loss has no KL term"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Any, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize(("steps", "accumulated"), [(2, 1), (2, 3)])
def test_a_batch_that_is_used_in_several_steps_has_an_old_policy(
    make_trainer: Any, steps: int, accumulated: int
) -> None:
    split = {"steps_per_generation": steps, "gradient_accumulation_steps": accumulated}
    trainer = make_trainer(num_iterations=1, beta=0.5, kl_target="old", max_steps=2, **split)
    trainer.train()
    assert any(entry["kl"] > 0 for entry in trainer.state.log_history if "kl" in entry)


def test_an_algorithm_that_does_not_score_the_old_policy_cannot_have_it_as_a_target(make_trainer: Any) -> None:
    class Ratioless(DiffuGRPOTrainer):
        uses_old_policy = False

    with pytest.raises(ValueError, match="kl_target='old' is not supported: Ratioless does not score the old policy"):
        make_trainer(trainer=Ratioless, beta=0.5, kl_target="old")
