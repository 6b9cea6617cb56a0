"""wd1: its weights, its first step from plain logits, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rl4dlm import WD1Config, WD1Trainer
from rl4dlm.algorithms.wd1 import signed_weights
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_sdar
from rl4dlm.rollout.rollout import Rollout, valid_mask
from tests.training.conftest import reward
from tests.training.steps import (
    adapter_step,
    check_gradient,
    check_splits,
    one_step,
    plain_log_probs,
    tiny_llada_that_ends,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

REWARDS = torch.tensor([[0.0, 1.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5]])


def test_weights_add_up_to_nothing_and_are_antisymmetric() -> None:
    weights = signed_weights(REWARDS, psi=3.0)
    torch.testing.assert_close(weights.sum(-1), torch.zeros(2).double())
    torch.testing.assert_close(signed_weights(-REWARDS, psi=3.0), -weights)
    torch.testing.assert_close(signed_weights(REWARDS + 7, psi=3.0), weights)
    assert not weights[1].any(), "equal rewards"
    pair = signed_weights(torch.tensor([[2.0, 0.5]]), psi=0.8)
    assert pair[0, 0].item() == pytest.approx(math.tanh(0.8 * 1.5 / 2))


def test_small_and_large_psi() -> None:
    psi = 1e-4
    centred = (REWARDS - REWARDS.mean(-1, keepdim=True)).double()
    torch.testing.assert_close(signed_weights(REWARDS, psi), 2 * psi / 4 * centred, rtol=0, atol=1e-11)
    largest = signed_weights(REWARDS[:1], psi=1e4)
    torch.testing.assert_close(largest, torch.tensor([[-1.0, 0.5, 0.0, 0.5]]).double())


def test_a_completion_without_reward_has_no_weight() -> None:
    weights = signed_weights(torch.tensor([[1.0, math.nan, 0.0], [math.nan] * 3]), psi=1.0)
    assert weights[0, 1] == 0 and weights[0, 0] == pytest.approx(math.tanh(0.5)) and not weights[1].any()


def test_a_softmax_over_the_batch() -> None:
    groups = signed_weights(REWARDS, psi=2.0, negative_weight=0.0, over="batch")
    assert groups.sum().item() == pytest.approx(2.0)
    assert groups[1].sum().item() < 1 < groups[0].sum().item()


@pytest.mark.parametrize(("negative_weight", "scope"), [(1.0, "valid"), (0.0, "canvas")])
def test_the_first_step_is_the_weighted_likelihood(make_trainer: Any, negative_weight: float, scope: str) -> None:
    trainer, gradients = one_step(
        make_trainer,
        WD1Trainer,
        model=tiny_llada_that_ends(),
        negative_weight=negative_weight,
        psi=2.0,
        scope=scope,
        stop_at_eos=scope == "valid",
    )
    assert 0 < trainer.state.log_history[0]["entropy"] < math.log(len(trainer.processing_class))
    record = trainer.seen[0]
    assert not {"old_per_token_logps", "ref_per_token_logps"} & record.keys()
    log_probs, views = plain_log_probs(trainer, record)
    assert views.hidden[..., -8:].all(), "all of a completion is hidden"
    assert not record["canvas_valid"].all(), "completions end early"
    scores = (log_probs[:, 0] * (record["canvas_valid"] if scope == "valid" else 1)).sum(-1)
    check_gradient(trainer, -(record["advantages"] * scores).sum() / 2, gradients)  # two groups


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    adapter_step(make_trainer, WD1Trainer)


def test_equal_rewards_change_nothing(make_trainer: Any) -> None:
    _, gradients = one_step(make_trainer, WD1Trainer, rewards=lambda completions, **_: [1.0] * len(completions))
    assert not any(gradient.any() for gradient in gradients.values())


def test_splitting_a_batch_changes_nothing(make_trainer: Any) -> None:
    check_splits(make_trainer, WD1Trainer)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("beta", 0.04, "no KL term"),
        ("epsilon", 0.5, "no policy ratio"),
        ("loss_type", "bnpo", "loss of its own"),
        ("use_bias_correction_kl", True, "use_bias_correction_kl=True is not supported"),
        ("sapo_temperature_pos", 2.0, "sapo_temperature_pos=2.0 is not supported"),
        ("vespo_k_neg", 1.5, "vespo_k_neg=1.5 is not supported"),
        ("entropy_target", 2.0, "entropy_target=2.0 is not supported"),
        ("scale_rewards", "group", "set psi"),
        ("multi_objective_aggregation", "normalize_then_sum", "set reward_weights"),
        ("scope", "all", "scope='all'"),
        ("psi", 0.0, "psi=0.0"),
        ("negative_weight", -1.0, "negative_weight=-1.0"),
        ("weights_over", "device", "weights_over='device'"),
        ("p_mask_prompt", 1.5, "p_mask_prompt=1.5"),
        ("num_predicted_steps", -1, "num_predicted_steps=-1"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Any, setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WD1Config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **{setting: value})


def test_what_the_loss_does_without_may_be_switched_off(tmp_path: Any) -> None:
    assert not WD1Config(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, use_bias_correction_kl=False
    ).use_bias_correction_kl


# --- wd1++ ------------------------------------------------------------------------------------------------------------


class Keeping(WD1Trainer):
    """Keeps its last rollout."""

    def rollout(self, prompts: list[Any]) -> Rollout:
        self.kept = super().rollout(prompts)
        return self.kept


THRESHOLD = {"schedule": "threshold", "denoising_steps": None, "schedule_args": {"threshold": 0.05}}


@pytest.mark.parametrize(
    ("scope", "settings"), [("valid", {}), ("canvas", {"stop_at_eos": False}), ("valid", THRESHOLD)]
)
def test_the_first_step_raises_what_steps_predicted(make_trainer: Any, scope: str, settings: dict[str, Any]) -> None:
    """Answers, their rewards, weights over all of a group, and the loss, written out; K of S steps count S / K."""
    trainer, gradients = one_step(
        make_trainer, Keeping, model=tiny_llada_that_ends(), rewards=reward, num_predicted_steps=2, psi=2.0,
        negative_weight=0.5, scope=scope, **settings,
    )  # fmt: skip
    record, rollout, decode = trainer.seen[0], trainer.kept, trainer.processing_class.decode
    steps, states = rollout.trace.steps.tolist(), torch.stack([*rollout.states()], dim=1)
    assert scope == "canvas" or not settings or len(set(steps)) > 1

    def ends(canvas: torch.Tensor) -> torch.Tensor:
        return valid_mask(canvas[None], trainer.spec.eos_token_ids)[0]

    def rewarded(canvas: torch.Tensor) -> float:
        return reward([decode(canvas[ends(canvas)], skip_special_tokens=True)])[0]

    answers = [[rollout.trace.fillings[row, s, 0].long() for s in range(steps[row])] for row in range(8)]
    for row, each in enumerate(answers):
        assert torch.equal(each[-1][rollout.valid[row]], rollout.canvas[row][rollout.valid[row]]), (
            "the last is the completion"
        )
    worth = [torch.tensor([rewarded(a) for row in range(g, g + 4) for a in answers[row]]) for g in (0, 4)]
    weights = [signed_weights(w[None], 2.0, 0.5)[0] for w in worth]
    by_answer = torch.cat(weights).split(steps)
    total = torch.zeros((), dtype=torch.float64)
    for place, row_id in enumerate(record["row_ids"].tolist()):
        row = rollout.row_ids.index(row_id)
        prompt, mask = record["prompt_ids"][place], record["prompt_mask"][place].bool()
        chosen = record["step_states"][place]
        shown = [s for k in range(2) for s in range(steps[row]) if torch.equal(states[row, s], chosen[k])]
        assert len(shown) == 2 and (len(set(shown)) == 2 or steps[row] == 1)
        for s in shown:
            ids = torch.cat([prompt[mask], states[row, s]])[None]
            logits = trainer.model(input_ids=ids).logits[0, -8:].double().log_softmax(-1)
            opened = states[row, s] == trainer.spec.mask_token_id
            counted = opened & (ends(answers[row][s]) if scope == "valid" else True)
            value = logits.gather(-1, answers[row][s][:, None])[:, 0][counted].sum()
            total = total - steps[row] / 2 * by_answer[row][s] * 8 / opened.sum() * value / 2  # two groups
    check_gradient(trainer, total.float(), gradients)
    assert record["drawn"].any(-1).all() and trainer.state.log_history[0]["diffusion/rollout_gap"] < 1e-5


def test_with_one_step_it_is_wd1(make_trainer: Any) -> None:
    common: dict[str, Any] = {"denoising_steps": 1, "p_mask_prompt": 0.0, "psi": 2.0}
    _, expected = one_step(make_trainer, WD1Trainer, model=tiny_llada_that_ends(), **common)
    _, found = one_step(make_trainer, WD1Trainer, model=tiny_llada_that_ends(), num_predicted_steps=1, **common)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_predictions_of_an_adapter_in_several_passes(make_trainer: Any) -> None:
    trainer = adapter_step(make_trainer, WD1Trainer, num_predicted_steps=3, one_view=True)
    assert not {"old_per_token_logps", "ref_per_token_logps"} & trainer.seen[0].keys()
    trainer.intervention = object()
    with pytest.raises(ValueError, match="intervention=object is not allowed with num_predicted_steps=3"):
        trainer._check_intervention()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_mask_prompt": 0.3}, "p_mask_prompt=0.3 is not allowed with num_predicted_steps=2"),
        ({"model": tiny_sdar}, "attention='block_causal' is not supported: wd1"),
        ({"schedule": "daedal", "denoising_steps": None}, "schedule='daedal' is not allowed"),
        (
            {"model": tiny_diffusion_gemma, "schedule": "entropy_bound_canvas", "denoising_steps": None},
            "noise='uniform'",
        ),
    ],
)
def test_what_has_no_whole_predictions_is_refused(make_trainer: Any, settings: dict[str, Any], message: str) -> None:
    made = {**settings, "model": settings["model"]()} if "model" in settings else settings
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer=WD1Trainer, config=WD1Config, num_predicted_steps=2, **made)
