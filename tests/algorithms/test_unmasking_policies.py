"""Policies beside a frozen model: what an update is of, that it asks no model, what is learnt, kept and refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import rl4dlm.training.frozen_model
from rl4dlm import (
    BernoulliUnmaskingConfig,
    BernoulliUnmaskingTrainer,
    CtrlDiffConfig,
    CtrlDiffTrainer,
    DecodingConfig,
    RolloutEngine,
    load_denoiser,
    load_task,
)
from rl4dlm.models.tiny import tiny_llada, tiny_sdar
from rl4dlm.rollout.policies.bernoulli import BernoulliPolicy, log_probability
from rl4dlm.rollout.policies.block_sizes import LearnedSizes
from rl4dlm.rollout.policies.policy import fresh
from rl4dlm.rollout.policies.saving import load_policy, save_policy
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.bernoulli import utilities_of
from rl4dlm.training.frozen_model import with_speed
from tests.training.steps import recording, tiny_llada_that_ends
from tests.training.test_resume import Kill

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

BERNOULLI: dict[str, Any] = {
    "trainer": BernoulliUnmaskingTrainer,
    "denoising_steps": None,
    "policy_hidden_size": 16,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "temperature": 0.0,
}
CTRLDIFF: dict[str, Any] = {"trainer": CtrlDiffTrainer, "denoising_steps": None, "block_sizes": [1, 2, 4]}
KINDS = {"bernoulli": BERNOULLI, "ctrldiff": {**CTRLDIFF, "temperature": 1.0, "schedule_args": {"threshold": 0.0}}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(make_trainer: Any, kind: str, **changes: Any) -> Any:
    settings = {**KINDS[kind], **changes}
    trainer = settings.pop("trainer")
    return make_trainer(trainer=recording(trainer), config=trainer.config_class, **settings)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# --- an update --------------------------------------------------------------------------------------------------------


@every_kind
def test_an_update_asks_no_model_and_leaves_it_alone(make_trainer: Any, kind: str) -> None:
    trainer = build(make_trainer, kind, num_iterations=3, max_steps=3)
    before, forwards, nfe = weights(trainer), [], []

    def note(*_: Any) -> None:
        assert not torch.is_grad_enabled()
        forwards.append(trainer.state.global_step)

    trainer.model.base_model.register_forward_pre_hook(note)
    decode = trainer.rollout

    def decoded(prompts: Any) -> Rollout:
        found: Rollout = decode(prompts)
        nfe.append(int(found.nfe.max()))
        return found

    trainer.rollout = decoded
    trainer.train()
    assert forwards == [0] * nfe[0] and len(nfe) == 1, "three updates, and the forwards of one rollout"
    for name, value in weights(trainer).items():
        changed = not torch.equal(value, before[name])
        assert not changed or "unmasking_policy." in name
    assert any(not torch.equal(v, before[n]) for n, v in weights(trainer).items())
    model = [p for n, p in trainer.model.named_parameters() if "unmasking_policy." not in n]
    assert all(p.grad is None and not p.requires_grad for p in model)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.policy.parameters()}
    log = trainer.state.log_history
    assert log[0]["unmasking/replay_gap"] < 1e-6 and "unmasking/replay_gap" not in log[1]
    assert log[0]["clip_ratio/region_mean"] == 0 < log[1]["clip_ratio/region_mean"]


def test_a_step_is_the_mean_of_steps_and_completions(make_trainer: Any) -> None:
    """Plain SGD: the gradient is that of the mean over completions of the mean over steps of A log p."""
    trainer = build(make_trainer, "bernoulli", max_steps=1, num_iterations=1, max_grad_norm=0.0, speed_alpha=2.0)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    trainer.train()
    (batch,) = trainer.seen
    after = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    with torch.no_grad():
        for name, p in trainer.policy.named_parameters():
            p.copy_(before[name])
    total = torch.zeros((), dtype=torch.float64)
    rewards = batch["forwards"].new_zeros(8)
    for row in range(8):
        asked = batch["policy_allowed"][row].any(-1)
        assert int(asked.sum()) == int(batch["forwards"][row]) == int(batch["commit_step"][row].max()) + 1
        time = torch.arange(int(asked.sum())).double() / 8
        states = batch["policy_features"][row][asked], batch["policy_allowed"][row][asked]
        log_probs = log_probability(
            utilities_of(trainer.policy, *states, time), states[1], batch["policy_chosen"][row][asked]
        )
        torch.testing.assert_close(log_probs, batch["scores"][row][asked], rtol=0, atol=1e-12)
        total = total - batch["advantages"][row].double() * log_probs.mean() / 8
    names = list(before)
    gradients = torch.autograd.grad(
        total, [dict(trainer.policy.named_parameters())[n] for n in names], allow_unused=True
    )
    for name, gradient in zip(names, gradients, strict=True):
        moved = (before[name] - after[name]) / 0.1
        expected = torch.zeros_like(moved) if gradient is None else gradient
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    assert float(dict(zip(names, gradients, strict=True))["output.weight"].abs().max()) > 1e-4
    assert rewards.shape == batch["advantages"].shape


def test_rewards_of_correctness_and_speed() -> None:
    rewards, forwards = (
        torch.tensor([[1.0, 1.0, 0.0, torch.nan]]).double(),
        torch.tensor([[1.0, 8.0, 1.0, 2.0]]).double(),
    )

    def found(**settings: Any) -> list[float]:
        args = BernoulliUnmaskingConfig(output_dir="unused", bf16=False, use_cpu=True, **settings)
        return with_speed(rewards, forwards, 8, args)[0].tolist()

    assert found()[:3] == [1.0, 0.125, 0.0], "a wrong answer earns nothing, however fast"
    assert found(speed_alpha=0.5)[1] == pytest.approx(0.125**0.5)
    assert found(speed_alpha=0.0)[:3] == found(speed="none")[:3] == [1.0, 1.0, 0.0]
    assert found(speed="additive", speed_alpha=0.4)[:3] == pytest.approx([0.95, 0.6, -0.05])
    assert found()[3] != found()[3], "no reward stays none"


@every_kind
def test_without_an_exponent_speed_does_not_count(build_trainer: Any, losses: Any, tmp_path: Path, kind: str) -> None:
    found = []
    for name, settings in (("zero", {"speed_alpha": 0.0}), ("none", {"speed": "none"}), ("one", {"speed_alpha": 1.0})):
        made = build(functools.partial(build_trainer, tmp_path / name), kind, **settings)
        made.train()
        found.append((made.seen[0]["advantages"].tolist(), losses(made)))
    assert found[0] == found[1] != found[2]


@every_kind
def test_splitting_a_batch_and_what_is_shown_at_once_change_nothing(
    build_trainer: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, size, numbers in (("whole", 8, 2**22), ("split", 2, 2**22), ("parts", 8, 600)):
        monkeypatch.setattr(rl4dlm.training.frozen_model, "NUMBERS_AT_ONCE", numbers)
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        made = build(functools.partial(build_trainer, tmp_path / name), kind, model=tiny_llada_that_ends(), **split)
        made.train()
        found.append({n: v for n, v in weights(made).items() if "unmasking_policy." in n})
        assert len(made.seen) == 2 * 8 // size
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-7)


def test_the_gradient_of_two_actions_is_the_analytic_one(make_trainer: Any) -> None:
    """Groups of two completions, each of their four outcomes in proportion to its probability: E[gradient] is
    (1 - 1/G) p (1 - p) (r_1 - r_2) for the first action's logit, G = 2."""
    trainer = build(
        make_trainer,
        "ctrldiff",
        block_sizes=[1, 2],
        policy_entropy=0.0,
        num_generations=2,
        speed="none",
        num_iterations=1,
    )
    with torch.no_grad():
        trainer.policy.choice.bias.copy_(torch.tensor([0.4, -0.5]))
    p = float(torch.tensor([0.4, -0.5]).double().softmax(-1)[0])
    reward, expected = (1.0, 0.3), torch.zeros(2, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for first in (0, 1):
        for second in (0, 1):
            actions = torch.tensor([first, second])
            chance = (p if first == 0 else 1 - p) * (p if second == 0 else 1 - p)
            values = torch.tensor([reward[first], reward[second]], dtype=torch.float64)
            chosen = torch.nn.functional.one_hot(actions, 2).bool()[:, None]
            inputs = {
                "policy_features": torch.zeros(2, 1, 2, 3),
                "policy_allowed": torch.ones(2, 1, 2, dtype=torch.bool),
                "policy_chosen": chosen,
                "selection_log_probs": torch.tensor([p, 1 - p], dtype=torch.float64).log()[actions][:, None],
                "advantages": values - values.mean(),
                "completion_mask": torch.ones(2, 2, dtype=torch.long),
                "canvas_ids": torch.zeros(2, 2, dtype=torch.long),
                "row_ids": torch.arange(2),
            }
            total = total + chance * trainer._compute_loss(trainer.model, inputs)
    found = torch.autograd.grad(total, trainer.policy.choice.bias)[0]
    slope = -(1 - 1 / 2) * p * (1 - p) * (reward[0] - reward[1])
    expected[0], expected[1] = slope, -slope
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- what is learnt ---------------------------------------------------------------------------------------------------


def least_sure_first(completions: list[str], rollout: Rollout, **columns: Any) -> list[float]:
    """Over pairs of a slot that a step wrote and one that it left open, the share of which the first was less sure."""
    trace = rollout.trace
    assert trace.policy_features is not None and trace.policy_allowed is not None and trace.policy_chosen is not None
    sure, left = trace.policy_features, trace.policy_allowed & ~trace.policy_chosen
    pairs = trace.policy_chosen[..., :, None] & left[..., None, :]
    right = pairs & (sure[..., :, None] < sure[..., None, :])
    shares: list[float] = (right.sum((1, 2, 3)) / pairs.sum((1, 2, 3)).clamp(min=1)).tolist()
    return shares


def always(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


LEARNS: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "num_generations": 16,
    "max_completion_length": 6,
    "logging_steps": 100,
    "num_iterations": 2,
    "stop_at_eos": False,
}


def greedy(trainer: Any) -> Rollout:
    config = trainer.decoding.with_arguments(policy_temperature=0)
    return RolloutEngine(trainer.model).generate([[5, 6, 7], [8]], config)


def test_a_policy_learns_the_order_that_pays(make_trainer: Any) -> None:
    """Of a frozen model whose tokens no order changes for the reward: what is less sure first."""
    settings = {**LEARNS, "speed": "none", "num_iterations": 1, "max_steps": 30}
    model = tiny_llada(initializer_range=0.5)
    trainer = build(make_trainer, "bernoulli", rewards=least_sure_first, model=model, **settings)

    def mean_reward() -> float:
        prompts = [[5, 6, 7], [8], [9, 4]]
        found = RolloutEngine(trainer.model).generate(prompts, trainer.decoding, num_generations=32, seed=3)
        return sum(least_sure_first([], found)) / len(found)

    before = mean_reward()
    trainer.train()
    assert before < 0.6 < before + 0.1 < mean_reward()


def test_a_policy_learns_to_be_fast_where_nothing_is_lost(make_trainer: Any) -> None:
    trainer = build(make_trainer, "bernoulli", rewards=always, **{**LEARNS, "max_steps": 30})
    assert greedy(trainer).nfe.tolist() == [6, 6]
    trainer.train()
    assert greedy(trainer).nfe.tolist() == [1, 1]


def test_a_policy_of_sizes_learns_which_pays(make_trainer: Any) -> None:
    """With a threshold of 0 a block is one forward, so that the largest size is the fastest."""
    settings = {**LEARNS, "num_iterations": 1, "max_steps": 30, "schedule_args": {"threshold": 0.0}, "temperature": 0.0}
    trainer = build(make_trainer, "ctrldiff", rewards=always, block_sizes=[1, 2, 3], **settings)
    trainer.train()
    assert greedy(trainer).nfe.tolist() == [2, 2]


# --- saving and resuming ----------------------------------------------------------------------------------------------


@every_kind
def test_a_killed_run_goes_on_bit_for_bit(build_trainer: Any, losses: Any, tmp_path: Path, kind: str) -> None:
    """From a checkpoint in the middle of a batch."""
    common = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "model": None}
    whole = build(functools.partial(build_trainer, tmp_path / "whole"), kind, **common)
    whole.train()
    kept = {"save_strategy": "steps", "save_steps": 1}
    killed = functools.partial(build_trainer, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        build(killed, kind, callbacks=[Kill(1)], **common, **kept).train()
    again = build(killed, kind, **common, **kept)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole) and max(map(abs, losses(whole))) > 1e-5
    found, expected = weights(again), weights(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@every_kind
def test_a_policy_is_saved_with_its_model_and_gone_on_with(build_trainer: Any, tmp_path: Path, kind: str) -> None:
    trainer = build(functools.partial(build_trainer, tmp_path / "run"), kind, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("unmasking" in name for name in trainer.model.state_dict())
    model = load_denoiser(tmp_path / "saved")
    schedule = trainer.args.schedule
    given = {"threshold": 0.0} if kind == "ctrldiff" else {}
    settings = DecodingConfig(canvas_length=8, schedule=schedule, stop_at_eos=False, schedule_args=given)
    prompts = [[5, 6, 7], [8], [9, 4]]
    alone = RolloutEngine(model).generate(prompts, settings, num_generations=4)
    own = trainer.decoding.with_arguments(policy=trainer.policy)
    there = RolloutEngine(trainer.model).generate(prompts, own.knowing(None), num_generations=4)
    assert alone.trace.commit_step.shape == there.trace.commit_step.shape
    if trainer.decoding.temperature == 0 and trainer.decoding.stop_at_eos is False:
        assert torch.equal(alone.trace.commit_step, there.trace.commit_step)
    saved = load_policy(tmp_path / "saved")
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)
    more = build(
        functools.partial(build_trainer, tmp_path / "more"), kind, policy_path=str(tmp_path / "saved"), max_steps=1
    )
    assert torch.equal(next(more.policy.parameters()), next(trainer.policy.parameters()))
    # That of the model's own folder is not replaced by a new one, unless it is of another kind, which is said.
    own = build(functools.partial(build_trainer, tmp_path / "own", load_denoiser(tmp_path / "saved")), kind)
    assert torch.equal(next(own.policy.parameters()), next(trainer.policy.parameters()))
    (other,) = {*KINDS} - {kind}
    with pytest.raises(
        ValueError, match=r"the unmasking policy of the model \(unmasking_policy.safetensors\) is of kind"
    ):
        build(functools.partial(build_trainer, tmp_path / "other", load_denoiser(tmp_path / "saved")), other)
    more.train()
    more.create_model_card()
    card = (tmp_path / "more" / "README.md").read_text()
    assert "'policy_temperature': 0" in card and "Policy(" not in card and "object at" not in card


def test_a_model_denoised_in_blocks_has_a_policy_too(make_trainer: Any) -> None:
    trainer = build(make_trainer, "bernoulli", model=tiny_sdar(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["unmasking/replay_gap"] < 1e-6
    with pytest.raises(ValueError, match="chooses its own blocks"):
        build(make_trainer, "ctrldiff", model=tiny_sdar())


def test_evaluation_decodes_greedily(make_trainer: Any, prompt_dataset: Any) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 1}
    trainer = build(make_trainer, "bernoulli", eval_dataset=prompt_dataset(2), **settings)
    trainer.check_exactly(load_task("few_clue_sudoku"), limit=2)
    assert [c.schedule_args["policy_temperature"] for c in trainer.exact_check.decodings.values()] == [0]
    trainer.train()
    log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert log["eval_solved"] == 0.0 and "eval_unmasking/reward" in log


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"speed": "fast"}, "speed='fast' is not allowed"),
        ({"speed_alpha": -1.0}, "speed_alpha=-1.0 is not allowed"),
        ({"speed": "none", "speed_alpha": 2.0}, "speed_alpha=2.0 has no effect with speed='none'"),
        ({"step_average": "max"}, "step_average='max' is not allowed"),
        ({"policy_entropy": -0.1}, "policy_entropy=-0.1 is not allowed"),
        ({"policy_temperature": 0.0}, "policy_temperature=0.0 is not allowed"),
        ({"policy_hidden_size": 6}, "hidden_size=6 is not allowed"),
        ({"schedule": "threshold"}, "schedule='threshold' is not allowed; it must be 'bernoulli'"),
        ({"schedule_args": {"policy": "x"}}, "schedule_args has policy, for which there are settings"),
        ({"beta": 0.1}, "beta=0.1 is not supported: no token is scored"),
        ({"loss_type": "bnpo"}, "loss_type='bnpo' is not supported"),
        ({"score_temperature": 0.5}, "score_temperature=0.5 is not supported"),
        ({"scope": "canvas"}, "scope='canvas' is not supported"),
        ({"denoising_steps": 4}, "denoising_steps=4 has no meaning"),
        ({"rollout_backend": "http", "rollout_url": "http://x", "rollout_weights_dir": "x"}, "rollout_backend='http'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        BernoulliUnmaskingConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert said in str(caught.value)


def test_other_refusals(make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sizes=\(4, 2\) is not allowed"):
        CtrlDiffConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, block_sizes=[4, 2])
    with pytest.raises(ValueError, match="schedule_args has sizes"):
        CtrlDiffConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, schedule_args={"sizes": [1]})
    for sizes in ([4], [8, 16]):
        with pytest.raises(ValueError, match=r"there is nothing to choose; two sizes"):
            build(make_trainer, "ctrldiff", block_sizes=sizes)
    with pytest.raises(TypeError, match="peft_config is not supported"):
        build(make_trainer, "bernoulli", peft_config=LoraConfig(target_modules=["q_proj"]))
    save_policy(fresh(LearnedSizes((1, 2)), seed=0, dtype=torch.float64), tmp_path)
    with pytest.raises(ValueError, match="is of kind 'block_sizes', not 'bernoulli'"):
        build(make_trainer, "bernoulli", policy_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"chooses among \[1, 2\], but block_sizes=\[1, 2, 4\]"):
        build(make_trainer, "ctrldiff", policy_path=str(tmp_path))
    with pytest.raises(ValueError, match="policy_hidden_size=16 contradicts policy_path=.*, which has 32"):
        build(make_trainer, "ctrldiff", policy_path=str(tmp_path), block_sizes=[1, 2], policy_hidden_size=16)
    save_policy(fresh(BernoulliPolicy(hidden_size=4), seed=0, dtype=torch.float64), tmp_path)
    with pytest.raises(ValueError, match="is of kind 'bernoulli', not 'block_sizes'"):
        build(make_trainer, "ctrldiff", policy_path=str(tmp_path))
    with pytest.raises(ValueError, match="policy_hidden_size=16 contradicts policy_path=.*, which has 4"):
        build(make_trainer, "bernoulli", policy_path=str(tmp_path))
    optimizer = torch.optim.SGD(tiny_llada().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers=... is not supported"):
        BernoulliUnmaskingTrainer(tiny_llada(), always, None, optimizers=(optimizer, None))
