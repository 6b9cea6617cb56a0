"""JustGRPO: scores are the log-probabilities that completions were drawn with; its first step, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import Inpainting, JustGRPOConfig, JustGRPOTrainer
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.training.loss_parts import resized
from tests.training.steps import check_first_iteration, check_gradient, lora_step, one_step, recording, tokens_mean

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("tokens_per_view", [1, 2])
def test_the_first_step_is_reinforce_with_exact_log_probabilities(make_trainer: Any, tokens_per_view: int) -> None:
    trainer, gradients = one_step(
        make_trainer, JustGRPOTrainer, beta=0.04, tokens_per_view=tokens_per_view, denoising_steps=None
    )
    check_first_iteration(trainer)
    record = trainer.seen[0]
    drawn = resized(record["drawn_log_probs"], record["scores"].shape[1])
    mask = record["completion_mask"].bool()
    assert mask.any()
    assert (drawn - record["scores"])[mask].abs().max() < 2e-6
    assert trainer.state.log_history[0]["diffusion/rollout_gap"] == pytest.approx(0, abs=2e-6)
    check_gradient(trainer, tokens_mean(trainer, record), gradients)


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    lora_step(make_trainer, JustGRPOTrainer, beta=0.04, denoising_steps=None)


def test_advantages_are_divided_by_the_deviation_of_the_group(make_trainer: Any) -> None:
    trainer, _ = one_step(
        make_trainer,
        JustGRPOTrainer,
        denoising_steps=None,
        rewards=lambda completions, **_: [float(i % 4) for i in range(len(completions))],
    )
    record = trainer.seen[0]
    found = record["advantages"][record["row_ids"].argsort()].view(-1, 4)
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_the_gap_to_tempered_draws_is_that_of_the_mask_token(make_trainer: Any) -> None:
    tempered = {"temperature": 0.6, "score_temperature": 0.6}
    trainer, _ = one_step(make_trainer, JustGRPOTrainer, denoising_steps=None, num_iterations=1, **tempered)
    gap = trainer.state.log_history[0]["diffusion/rollout_gap"]
    assert 0 < gap < 0.02, "the untrained model gives each of a hundred tokens, and so the mask, about the same"


def test_interventions_are_refused(make_trainer: Any) -> None:
    class Trainer(JustGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, intervention=Inpainting(free_tail=0), **kwargs)

    with pytest.raises(ValueError, match="intervention=Inpainting is not allowed"):
        make_trainer(trainer=Trainer, config=JustGRPOConfig, denoising_steps=None)


@pytest.mark.parametrize(("tokens_per_view", "steps"), [(1, 24), (4, 6)])
def test_steps_follow_from_the_canvas(tokens_per_view: int, steps: int, tmp_path: Any) -> None:
    settings = {"max_completion_length": 24, "tokens_per_view": tokens_per_view}
    config = JustGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert config.denoising_steps == steps and config.one_view


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"schedule": "low_confidence"},
            "schedule='low_confidence' is not allowed; JustGRPO decodes with left_to_right",
        ),
        ({"denoising_steps": 64}, r"denoising_steps=64 is not allowed; 1 tokens per step.*are 256 steps"),
        ({"tokens_per_view": 3}, "tokens_per_view=3 is not allowed; it must divide max_completion_length=256"),
        ({"tokens_per_view": 8, "block_length": 4}, "tokens_per_view=8 is not allowed; it must divide block_length=4"),
        ({"tokens_per_view": 0}, "tokens_per_view=0"),
        ({"scope": "all"}, "scope='all'"),
        ({"temperature": 0.6}, "temperature=0.6 is not allowed with score_temperature=1.0"),
        ({"top_p": 0.9}, "top_p=0.9 is not allowed.*needed: 1.0"),
        ({"top_k": 20}, "top_k=20 is not allowed.*needed: 0"),
        ({"cache": "prefix"}, "cache='prefix' is not allowed.*needed: 'none'"),
        ({"eos_penalty": 1.0}, "eos_penalty=1.0 is not allowed"),
        ({"min_new_tokens": 4}, "min_new_tokens=4 is not allowed"),
        ({"disable_dropout": False}, "disable_dropout=False is not allowed.*needed: True"),
        ({"scope": "canvas"}, "scope='canvas' is not allowed with stop_at_eos=True"),
        ({"suppress_token_ids": [3]}, r"suppress_token_ids=\[3\] is not allowed.*needed: None"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=said):
        JustGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_models_with_blocks_are_scored_in_as_many_views_as_a_block_has_tokens(make_trainer: Any) -> None:
    """With the scores that completions were drawn with, and those of a view per token."""
    seen = {}
    for within in (None, "canvas"):
        model = tiny_llada()
        model.config.diffusion.update(attention="block_causal", block_length=4)
        trainer = make_trainer(
            trainer=recording(JustGRPOTrainer), config=JustGRPOConfig, model=model, denoising_steps=8, max_steps=1,
            within=within,
        )  # fmt: skip
        trainer.train()
        assert trainer.estimator.within == (within or "block")
        assert trainer.state.log_history[0]["diffusion/rollout_gap"] < 1e-5
        seen[within] = trainer.seen[0]
        assert seen[within]["scores"].any()
    torch.testing.assert_close(seen[None]["scores"], seen["canvas"]["scores"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="within='block' is not allowed for a model with attention='full'"):
        make_trainer(trainer=JustGRPOTrainer, config=JustGRPOConfig, denoising_steps=8, within="block")
    model = tiny_llada()
    model.config.diffusion.update(attention="block_causal", block_length=4, grid_origin="position_zero")
    with pytest.raises(ValueError, match="tokens_per_view=2 is not allowed for a model whose blocks begin"):
        make_trainer(
            trainer=JustGRPOTrainer, config=JustGRPOConfig, model=model, tokens_per_view=2, denoising_steps=None
        )
    with pytest.raises(ValueError, match="within='row' is not allowed; choose one of canvas, block"):
        make_trainer(trainer=JustGRPOTrainer, config=JustGRPOConfig, denoising_steps=8, within="row")
