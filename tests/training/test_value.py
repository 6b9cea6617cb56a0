"""Value models: estimates of advantages, losses of values, and the head in training, files and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from rl4dlm import (
    AGRPOTrainer,
    CJGRPOTrainer,
    DiPOTrainer,
    EGSPOTrainer,
    TraceRLConfig,
    TraceRLTrainer,
    TreeRPOTrainer,
    load_denoiser,
)
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.steps import Steps
from rl4dlm.likelihood.views import Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_dream, tiny_llada, tiny_sdar
from rl4dlm.models.value_head import VALUE_FILE, attach_value_head
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.trainer import rows_of
from rl4dlm.training.value import (
    advantage_estimates,
    earned_at,
    step_gains,
    value_losses,
    valued_tokens,
    variance_share,
    variance_sums,
)
from tests.training.conftest import reward
from tests.training.steps import recording, tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

VALUED: dict[str, Any] = {"value_model": "steps", "value_learning_rate": 0.05, "num_iterations": 1, "beta": 0.0}
THRESHOLD = {"schedule": "threshold", "denoising_steps": None, "schedule_args": {"threshold": 0.011}}


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- formulas -------------------------------------------------------------------------------------------------------


def test_estimates_of_advantages_keep_their_identities() -> None:
    rewards, values = some(3, 5), some(3, 5, seed=1)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1).double()], dim=1)
    for gamma in (1.0, 0.9):
        errors = rewards - values + gamma * after
        returns = sum(gamma**k * torch.nn.functional.pad(rewards, (0, k))[:, k:] for k in range(5))
        whole, found = advantage_estimates(rewards, values, gamma=gamma, lam=1.0)
        torch.testing.assert_close(found, returns, rtol=0, atol=1e-12)
        torch.testing.assert_close(whole, returns - values, rtol=0, atol=1e-12)
        torch.testing.assert_close(advantage_estimates(rewards, values, gamma=gamma, lam=0.0)[0], errors)
        partly = sum((0.7 * gamma) ** k * torch.nn.functional.pad(errors, (0, k))[:, k:] for k in range(5))
        torch.testing.assert_close(advantage_estimates(rewards, values, gamma=gamma, lam=0.7)[0], partly)
    empty = torch.zeros(2, 0)
    assert advantage_estimates(empty, empty, gamma=1.0, lam=1.0)[0].shape == (2, 0)


def test_tokens_have_values_of_their_own_and_steps_their_mean() -> None:
    """TraceRL's A_j = r_j - V_j + gamma V*_{t+1} + gamma lambda A*_{t+1}, token by token; rows of different lengths."""
    unit = torch.tensor([[0, 1, 1, 2, 2, -1], [1, 0, -1, 0, -1, -1]])
    values, reward = some(2, 6), torch.tensor([2.0, -1.0]).double()
    tokens = torch.tensor([[1.0, 2, 2], [2, 1, 0]]).double()
    earned = earned_at(reward, tokens, "end")
    assert earned.tolist() == [[0, 0, 2], [0, -1, 0]]
    found = valued_tokens(values, unit, earned, gamma=0.9, lam=0.5)
    for row in range(2):
        count = int(unit[row].max()) + 1
        mean = [float(values[row][unit[row] == t].mean()) for t in range(count)] + [0.0]
        steps = [0.0] * (count + 1)
        for t in reversed(range(count)):
            steps[t] = float(earned[row, t]) - mean[t] + 0.9 * mean[t + 1] + 0.45 * steps[t + 1]
        for j, t in enumerate(unit[row].tolist()):
            expected = 0.0
            if t >= 0:
                expected = float(earned[row, t] - values[row, j]) + 0.9 * mean[t + 1] + 0.45 * steps[t + 1]
            assert float(found.advantages[row, j]) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(found.weight, (unit >= 0).double())
    plain = valued_tokens(values, unit, earned, gamma=1.0, lam=1.0)
    expected = torch.where(unit >= 0, reward[:, None] - values, 0.0)
    torch.testing.assert_close(plain.advantages, expected, rtol=0, atol=1e-12)


def test_a_block_has_the_value_of_its_first_tokens_and_the_weight_of_all() -> None:
    block, lead = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[True, False, True, False, True]])
    values, tokens = torch.tensor([[1.0, 50, 3, 50, 5]]).double(), torch.tensor([[3.0, 2.0]]).double()
    earned = earned_at(torch.tensor([10.0]).double(), tokens, "revealed")
    assert earned.tolist() == [[6.0, 4.0]]
    found = valued_tokens(values, block, earned, gamma=1.0, lam=1.0, lead=lead)
    assert found.advantages.tolist() == [[8.0, 8.0, 8.0, -1.0, -1.0]]
    assert found.returns.tolist() == [[10.0, 10.0, 10.0, 4.0, 4.0]]
    assert found.weight.tolist() == [[1.5, 0.0, 1.5, 0.0, 2.0]]
    nothing = (
        earned_at(torch.ones(1), torch.zeros(1, 3), "end"),
        earned_at(torch.ones(1), torch.zeros(1, 3), "revealed"),
    )
    assert not any(each.any() for each in nothing), "no tokens"


def test_what_steps_gain_adds_up_to_the_reward_less_that_of_the_start() -> None:
    nan = torch.nan
    given = torch.tensor([[0.5, nan, 0.25], [1.0, nan, nan]])
    gains = step_gains(given, torch.tensor([1.0, 3.0]), 4)
    assert gains.tolist() == [[-0.25, 0.0, 0.75, 0.0], [2.0, 0.0, 0.0, 0.0]]
    assert step_gains(given, torch.tensor([1.0, 3.0]), 2).shape == (2, 2)


def test_losses_of_values_stop_falling_beyond_the_clip() -> None:
    old, returns = torch.zeros(3), torch.ones(3)
    values = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    losses = value_losses(values, old, returns, 0.2)
    assert losses.tolist() == pytest.approx([0.81 / 2, 0.64 / 2, 2.25 / 2])
    assert torch.autograd.grad(losses.sum(), values)[0].tolist() == pytest.approx([-0.9, 0.0, -1.5])
    assert value_losses(values, old, returns, None).tolist() == pytest.approx([0.81 / 2, 0.25 / 2, 2.25 / 2])


def test_explained_variance() -> None:
    returns, weight = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    halves = variance_sums(returns[:2], returns[:2], weight[:2]) + variance_sums(returns[2:], returns[2:], weight[2:])
    assert variance_share(halves) == pytest.approx(1.0)
    assert variance_share(variance_sums(returns + 5, returns, weight)) == pytest.approx(1.0), "a constant error is none"
    assert variance_share(variance_sums(torch.zeros(4), returns, weight)) == pytest.approx(0.0)
    assert variance_share(variance_sums(-returns, returns, weight)) == pytest.approx(-3.0)
    assert variance_share(variance_sums(returns, torch.ones(4), weight)) is None
    assert variance_share(torch.zeros(5)) is None


# --- the head in the scoring forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream, tiny_sdar])
def test_values_are_of_the_states_that_tokens_are_predicted_from(make: Any) -> None:
    """The head put in the place of a token's row of the vocabulary head: its value is that token's logit."""
    model = attach_scoring(make().double())
    spec = DiffusionSpec.of(model)
    attach_value_head(model).weight.data = model.get_output_embeddings().weight[3].detach().clone()
    ids = torch.randint(4, 20, (2, 12), generator=torch.Generator().manual_seed(1))
    hidden = torch.zeros(2, 2, 12, dtype=torch.bool)
    hidden[:, 0, 4:] = hidden[:, 1, 8:] = True
    weight = torch.zeros(2, 2, 8)
    weight[:, 0, :4] = weight[:, 1, 4:] = 1.0
    views, mask = Views(hidden, weight), torch.ones_like(ids)

    def scores(**options: Any) -> Any:
        return score_views(model, spec, ids, mask, views, values=True, **options)

    found, asked = scores(), ids.clone()
    asked[:, 4:] = 3
    # log p(3) is the logit less the log of the sum; two tokens give their difference, whatever that is.
    logit = {}
    for token in (3, 5):
        asked[:, 4:] = token
        if spec.attention == "full":  # whose states do not show the tokens that are asked for
            seen = torch.where(views.hidden[:, 0], spec.mask_token_id, ids)
            logits = model(input_ids=seen, attention_mask=mask).logits.log_softmax(-1)
            logit[token] = logits.roll(spec.logit_shift, 1)[:, 4:8, token]
    if logit:
        other = model.get_output_embeddings().weight[5].detach().clone()
        mine = found.values[:, 0, :4]
        model.value_head.weight.data = other
        theirs = scores().values[:, 0, :4]
        torch.testing.assert_close(mine - theirs, logit[3] - logit[5], rtol=0, atol=1e-10)
        model.value_head.weight.data = model.get_output_embeddings().weight[3].detach().clone()
    assert (found.values != 0).equal(views.scored)
    plain = score_views(model, spec, ids, mask, views)
    assert plain.values is None and torch.equal(plain.log_probs, found.log_probs)
    for options in ({"one_view": True}, {"share": False}):
        torch.testing.assert_close(scores(**options).values, found.values, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(scores(rows_per_forward=1).values, found.values, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="needs a value head"):
        model.value_head = None
        scores()


# --- training ---------------------------------------------------------------------------------------------------------


def run(make_trainer: Any, trainer: type = TraceRLTrainer, **settings: Any) -> Any:
    made = make_trainer(
        trainer=recording(trainer), config=trainer.config_class, **{**VALUED, "max_steps": 1, **settings}
    )
    made.train()
    return made


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_target": "advantage"},
        {"value_model": "blocks", "block_length": 4, "value_rewards": "revealed", "ratio_unit": "step"},
        {"num_iterations": 2, "max_steps": 2, "beta": 0.01, "value_trains_trunk": True, "gae_lambda": 0.9},
    ],
    ids=["steps", "advantage", "blocks", "two passes"],
)
def test_values_move_towards_the_returns(make_trainer: Any, settings: dict[str, Any]) -> None:
    trainer = run(make_trainer, model=tiny_llada_that_ends(), **settings)
    assert float(trainer.value_head.weight.abs().max()) > 1e-4
    log = trainer.state.log_history[0]
    assert log["diffusion/value_loss"] > 0 and log["diffusion/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    record = trainer.seen[0]
    expected = {round(each, 5) for each in record["value_rewards"].tolist()}
    assert len(expected) > 2
    assert expected <= {round(k / 7, 5) for k in range(7)}, "weighted rewards, of this process's rows"


def test_with_a_new_head_the_gradient_is_that_of_the_reward_without_a_baseline(make_trainer: Any) -> None:
    """V = 0: advantages are rewards; and a head on detached states leaves the policy's step alone."""

    class Plain(TraceRLTrainer):
        def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
            return rewards

    common = {"num_iterations": 1, "beta": 0.0, "max_grad_norm": 0.1}
    expected = make_trainer(model=tiny_llada_that_ends(), trainer=Plain, config=TraceRLConfig, max_steps=1, **common)
    expected.train()
    found = run(make_trainer, model=tiny_llada_that_ends(), **common)
    theirs = weights(expected)
    for name, value in weights(found).items():
        if "value_head" not in name:
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainer", [TraceRLTrainer, DiPOTrainer])
def test_values_of_models_that_denoise_block_by_block(make_trainer: Any, trainer: type) -> None:
    for what in ("steps", "blocks"):
        made = run(make_trainer, trainer, model=tiny_sdar(), value_model=what, **THRESHOLD)
        assert float(made.value_head.weight.abs().max()) > 1e-4


def test_values_of_a_shifted_model(make_trainer: Any) -> None:
    made = run(make_trainer, CJGRPOTrainer, model=tiny_dream())
    assert float(made.value_head.weight.abs().max()) > 1e-4


def test_one_view_at_a_time_changes_nothing_and_reentrant_checkpoints_neither(make_trainer: Any) -> None:
    trunk = {"value_trains_trunk": True, "max_steps": 2, "num_iterations": 2}
    found = [
        weights(run(make_trainer, model=tiny_llada_that_ends(), **trunk, **options))
        for options in (
            {"one_view": True},
            {"one_view": False},
            {
                "one_view": True,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
        )
    ]
    for other in found[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=0, atol=1e-6)


def test_old_values_are_kept_for_later_passes_and_the_clip(make_trainer: Any) -> None:
    trainer = run(make_trainer, model=tiny_llada_that_ends(), num_iterations=2, max_steps=2)
    first, second = trainer.seen
    assert "old_values" not in first and not second["old_values"].any(), "those of the head as it was"
    trainer = run(make_trainer, model=tiny_llada_that_ends(), steps_per_generation=2, per_device_train_batch_size=4)
    assert "old_values" in trainer.seen[0], "scored before several steps of the optimizer"


def test_rewards_of_steps_are_gains(make_trainer: Any) -> None:
    class Gaining(TraceRLTrainer):
        def step_rewards(self, rollout: Rollout, steps: Steps) -> Tensor:
            return steps.first / 10.0

    made = run(make_trainer, Gaining, model=tiny_llada_that_ends())
    record = made.seen[0]
    steps = made.estimator.steps(rows_of(record), seed=made.args.seed, iteration=0)
    there = steps.last >= steps.first
    assert torch.equal(record["step_rewards"].isnan(), ~there)
    torch.testing.assert_close(record["step_rewards"][there], (steps.first / 10.0)[there])
    with pytest.raises(ValueError, match="has rewards of steps"):
        run(make_trainer, Gaining, value_model="blocks", block_length=4)


def unknown(completions: list[str], **columns: Any) -> list[float | None]:
    return [None if i % 2 else value for i, value in enumerate(reward(completions))]


def test_nothing_is_learnt_where_a_reward_could_not_be_told(make_trainer: Any) -> None:
    trainer = run(make_trainer, model=tiny_llada_that_ends(), rewards=unknown)
    assert trainer.seen[0]["value_rewards"].isnan().sum() == 4
    assert all(bool(value.isfinite().all()) for value in weights(trainer).values())


# --- the optimizer, files, resuming ----------------------------------------------------------------------------------


def test_the_head_is_a_group_of_its_own_and_in_a_file_of_its_own(make_trainer: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    for adapter in (None, lora):
        trainer = run(make_trainer, model=tiny_llada_that_ends(), peft_config=adapter, optim="adamw_torch")
        *others, last = trainer.optimizer.param_groups
        assert last["params"] == [trainer.value_head.weight]
        assert (last["initial_lr"], last["weight_decay"]) == (0.05, 0.0)
        assert all(group["initial_lr"] == 0.1 for group in others)
        assert trainer.value_head.weight.requires_grad and trainer.value_head.weight.dtype == torch.float32
        folder = tmp_path / ("lora" if adapter else "full")
        trainer.save_model(str(folder))
        assert torch.equal(load_file(folder / VALUE_FILE)["weight"], trainer.value_head.weight.detach())
        stored = folder / ("adapter_model.safetensors" if adapter else "model.safetensors")
        assert not any("value_head" in name for name in load_file(stored))
        if adapter is None:
            again = load_denoiser(str(folder))
            assert getattr(again, "value_head", None) is None
            with pytest.raises(ValueError, match=f"{VALUE_FILE} is of hidden states of"):
                type(trainer.value_head)(3).load(folder)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resuming_is_bit_equal(build_trainer: Any, losses: Any, tmp_path: Path, adapter: bool) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if adapter else None

    def made(folder: str, **changes: Any) -> Any:
        settings = {
            **VALUED,
            **{"num_iterations": 2, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2},
            **{"save_strategy": "steps", "save_steps": 1, "value_trains_trunk": True, "gae_lambda": 0.9},
        }
        return build_trainer(
            tmp_path / folder,
            tiny_llada_that_ends(),
            trainer=TraceRLTrainer,
            config=TraceRLConfig,
            peft_config=lora,
            **{**settings, **changes},
        )

    whole = made("whole")
    whole.train()
    for step in (1, 2):  # within a batch, and between two
        resumed = made(f"from {step}", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed)[step - 4 :] == losses(whole)[step:]
        theirs = weights(whole)
        assert all(torch.equal(value, theirs[name]) for name, value in weights(resumed).items())
    (tmp_path / "whole" / "checkpoint-1" / VALUE_FILE).unlink()
    manifest = tmp_path / "whole" / "checkpoint-1" / "checkpoint_manifest.json"
    manifest.unlink()
    with pytest.raises(ValueError, match="had no value model"):
        made("again", save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("trainer", "settings", "match"),
    [
        (TraceRLTrainer, {"gae_lambda": 0.9}, "no effect with value_model='none'"),
        (TraceRLTrainer, {"value_model": "step"}, "value_model='step'"),
        (TraceRLTrainer, {**VALUED, "gae_lambda": 1.1}, "gae_lambda=1.1"),
        (TraceRLTrainer, {**VALUED, "value_learning_rate": 0.0}, "value_learning_rate=0.0"),
        (TraceRLTrainer, {**VALUED, "value_target": "z"}, "value_target='z'"),
        (TraceRLTrainer, {**VALUED, "ratio_unit": "sequence"}, "ratio_unit='sequence'"),
        (CJGRPOTrainer, {**VALUED, "old_policy": "recorded"}, "value_clip=0.2 is not allowed"),
        (AGRPOTrainer, {**VALUED, "num_scored_steps": 2}, "steps='sampled'"),
        (EGSPOTrainer, VALUED, "steps='top_entropy'"),
        (TreeRPOTrainer, {**VALUED, "num_generations": None}, "value_model='steps' is not allowed"),
        (
            TraceRLTrainer,
            {**VALUED, "value_target": "advantage", "negative_advantage_weight": 0.5},
            "negative_advantage_weight=0.5",
        ),
        (TraceRLTrainer, {**VALUED, "load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end"),
    ],
)
def test_what_does_not_go_together_is_refused(
    make_trainer: Any, trainer: Any, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        make_trainer(trainer=trainer, config=trainer.config_class, **settings)


def test_advantages_of_an_algorithms_own_are_refused(make_trainer: Any) -> None:
    class Own(CJGRPOTrainer):
        def step_advantages(self, rewards: Tensor, step_rewards: Any, batch: dict[str, Any]) -> None:
            return None

    with pytest.raises(ValueError, match="has advantages of its own"):
        run(make_trainer, Own)
