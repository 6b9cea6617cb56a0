"""SPG: its first step from plain logits, what it scores, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rl4dlm import SPGConfig, SPGTrainer
from rl4dlm.likelihood.blockwise import BlockELBO
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import check_gradient, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def plain_objective(trainer: Any, record: dict[str, Any], beta: float, omega: float) -> Tensor:
    """SPG's loss by its equations: bounds per token, times lengths, over all lengths."""
    log_probs, views = plain_log_probs(trainer, record)
    scored = views.scored
    length = record["canvas_valid"].sum(-1)
    losses = []
    for i, advantage in enumerate(record["advantages"].tolist()):
        p, s = log_probs[i], scored[i]
        lower = torch.stack([(p[v] * s[v]).sum() / s[v].sum() for v in range(len(p))]).mean()
        level = s.sum(-1) / length[i]
        inside = (s / level[:, None] * p.exp() ** beta).mean(0)
        upper = inside[s.any(0)].log().mean() / beta
        bound = lower if advantage > 0 else omega * upper + (1 - omega) * lower
        losses.append(-advantage * bound * length[i])

    return torch.stack(losses).sum() / length.sum()


@pytest.mark.parametrize("masking", ["block_random", "random"])
def test_the_first_step_is_the_sandwich(make_trainer: Any, masking: str) -> None:
    trainer, gradients = one_step(make_trainer, SPGTrainer, masking=masking, block_length=4, num_views=3)
    record = trainer.seen[0]
    assert (record["advantages"] < 0).any() and (record["advantages"] > 0).any()
    check_gradient(trainer, plain_objective(trainer, record, beta=1.5, omega=0.5), gradients)


@pytest.mark.parametrize("negatives", ["elbo", "zero"])
def test_the_evidence_lower_bound_of_blocks(make_trainer: Any, negatives: str) -> None:
    settings = {"masking": "block_elbo", "negatives": negatives, "block_length": 4, "num_views": 2}
    trainer, gradients = one_step(make_trainer, SPGTrainer, **settings)
    assert isinstance(trainer.estimator, BlockELBO) and trainer.estimator.block_length == 4
    record = trainer.seen[0]
    log_probs, views = plain_log_probs(trainer, record)
    assert not views.hidden[..., : record["prompt_ids"].shape[1]].any(), "prompts are shown"
    advantages = record["advantages"].clamp(min=0) if negatives == "zero" else record["advantages"]
    bounds = (log_probs * views.weight).sum((1, 2))
    check_gradient(trainer, -(advantages * bounds).sum() / record["canvas_valid"].sum(), gradients)
    assert trainer.state.log_history[0]["entropy"] > 0


def test_an_adapter_is_trained_and_no_other_policy_is_scored(make_trainer: Any) -> None:
    adapter = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    trainer, gradients = one_step(make_trainer, SPGTrainer, peft_config=adapter, num_iterations=4, max_steps=2)
    assert trainer.ref_model is None
    assert not {"old_per_token_logps", "ref_per_token_logps"} & trainer.seen[0].keys()
    assert gradients and all("lora_" in name for name in gradients)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    first, second = (dict(zip(r["row_ids"].tolist(), r["scores"], strict=True)) for r in trainer.seen)
    assert any((first[row] - second[row]).abs().max() > 1e-3 for row in first), "each pass has views of its own"


def test_equal_rewards_change_nothing(make_trainer: Any) -> None:
    _, gradients = one_step(make_trainer, SPGTrainer, rewards=lambda completions, **_: [1.0] * len(completions))
    assert not any(gradient.any() for gradient in gradients.values())


def test_splitting_a_batch_changes_nothing(make_trainer: Any, losses: Any) -> None:
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = make_trainer(
            trainer=SPGTrainer,
            config=SPGConfig,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=2e-6)


def test_which_bound_a_completion_counts_with(make_trainer: Any) -> None:
    trainer = make_trainer(trainer=SPGTrainer, config=SPGConfig, num_views=2)
    record = _batch(trainer)
    scores = _scores(trainer, record)
    positive = torch.tensor([True, False])
    trainer.args.negatives = "elbo"
    lower = trainer.bounds(scores, positive).sum(-1)
    found = {}
    for negatives in ("zero", "eubo", "mix"):
        trainer.args.negatives = negatives
        found[negatives] = trainer.bounds(scores, positive).sum(-1)
        assert found[negatives][0] == lower[0]
    assert found["zero"][1] == 0
    assert found["eubo"][1] != lower[1]  # the other one is not always the larger in two views
    assert found["mix"][1] == pytest.approx(((found["eubo"] + lower) / 2)[1].item())


def _batch(trainer: Any) -> dict[str, Tensor]:
    return {
        "prompt_ids": torch.full((2, 3), 9),
        "prompt_mask": torch.ones(2, 3, dtype=torch.long),
        "canvas_ids": torch.arange(10, 26).view(2, 8),
        "canvas_valid": torch.ones(2, 8, dtype=torch.bool),
        "row_ids": torch.arange(2),
    }


def _scores(trainer: Any, batch: dict[str, Tensor]) -> PolicyScores:
    with torch.no_grad():
        log_probs, views = plain_log_probs(trainer, batch)
    return PolicyScores(trainer.estimator.reduce(log_probs, views), torch.zeros(2, 8), views, log_probs)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("beta", 0.04, "no KL term"),
        ("epsilon", 0.5, "no policy ratio"),
        ("epsilon_high", 0.3, "no policy ratio"),
        ("importance_sampling_level", "sequence", "no policy ratio"),
        ("loss_type", "bnpo", "loss of its own"),
        ("use_bias_correction_kl", True, "use_bias_correction_kl=True is not supported"),
        ("sapo_temperature_pos", 2.0, "sapo_temperature_pos=2.0 is not supported"),
        ("vespo_k_neg", 1.5, "vespo_k_neg=1.5 is not supported"),
        ("entropy_target", 2.0, "entropy_target=2.0 is not supported"),
        ("sync_ref_model", True, "no reference"),
        ("masking", "blocks", "masking='blocks'"),
        ("negatives", "none", "negatives='none'"),
        ("eubo_beta", 0.5, "eubo_beta=0.5"),
        ("num_views", 0, "num_views=0"),
        ("mix_weight", 2.0, "mix_weight=2.0"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Any, setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPGConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "random", "block_choice": "published"}, "block_choice='published'.*masking='random'"),
        ({"masking": "all", "scored": "block"}, "scored='block'.*masking='all'"),
        ({"negatives": "elbo", "eubo_beta": 2.0}, "eubo_beta=2.0.*negatives='elbo'"),
        ({"negatives": "zero", "mix_weight": 0.1}, "mix_weight=0.1.*negatives='zero'"),
        ({"negatives": "eubo", "mix_weight": 0.1}, "mix_weight=0.1.*negatives='eubo'"),
        ({"masking": "block_elbo"}, "negatives='mix' is not allowed with masking='block_elbo'"),
        (
            {"masking": "block_elbo", "negatives": "elbo", "p_mask_prompt": 0.3},
            "p_mask_prompt=0.3.*masking='block_elbo'",
        ),
        ({"masking": "block_elbo", "negatives": "elbo", "scored": "block"}, "scored='block'.*masking='block_elbo'"),
    ],
)
def test_what_another_setting_leaves_without_effect_is_refused(
    tmp_path: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SPGConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
