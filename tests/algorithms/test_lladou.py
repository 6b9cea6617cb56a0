"""LLaDOU: its loss, what is trained, saved and resumed, and an order that is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from rl4dlm import LLaDOUConfig, LLaDOUTrainer, RolloutEngine, load_denoiser
from rl4dlm.models.tiny import tiny_dream, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.policies.hidden_states import LinearPolicy, UnmaskingPolicyModule
from rl4dlm.rollout.policies.policy import Seen, attach_policy, attached_policy, fresh
from rl4dlm.rollout.policies.saving import POLICY_FILE, load_policy, save_policy
from rl4dlm.training.trainer import rows_of
from tests.training.steps import recording, tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def trained(make_trainer: Any) -> Any:
    def run(*, start: bool = True, trainer: type = LLaDOUTrainer, **settings: Any) -> Any:
        made = make_trainer(
            trainer=recording(trainer), config=LLaDOUConfig, **{"num_iterations": 1, "policy_heads": 2, **settings}
        )
        if start:
            made.train()
        return made

    return run


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def stirred(model: Any, **settings: Any) -> Any:
    """A model with a policy on it none of whose weights is 0."""
    policy = fresh(UnmaskingPolicyModule(model.config.hidden_size, frequencies=8, heads=2, **settings), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    attach_policy(model, policy)
    return model


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("settings", [{}, {"block_length": 4, "temperature": 0.7}], ids=["plain", "blocks"])
def test_the_loss_is_that_of_the_equations(trained: Any, make: Any, settings: dict[str, Any]) -> None:
    """From the model's own logits, and utilities of its states one step at a time; off policy, so that clips act."""
    made = trained(model=stirred(make()), start=False, max_steps=1, policy_heads=None, **settings)
    made.train()
    batch = made.seen[0]
    steps, length = 4, 8
    temperature = settings.get("temperature", 1.0)
    block = torch.arange(length) // settings.get("block_length", length)
    step, rank, canvas = batch["commit_step"], batch["commit_rank"], batch["canvas_ids"]
    log_probs = plain_tempered(made, batch, temperature)
    of_steps = torch.zeros(len(canvas), steps)
    for row in range(len(canvas)):
        for k in range(steps):
            wrote = sorted((step[row] == k).nonzero().squeeze(-1).tolist(), key=lambda slot: int(rank[row, slot]))
            utilities = utilities_at(made, batch, row, k, steps, block)
            left = [slot for slot in range(length) if step[row, slot] >= k and block[slot] == block[wrote[0]]]
            certain = len(left) == len(wrote)
            for slot in wrote:
                of_steps[row, k] += log_probs[row, k, slot]
                if not certain:
                    of_steps[row, k] += utilities[left].log_softmax(-1)[left.index(slot)]
                    left.remove(slot)
    advantages = batch["advantages"]
    old = of_steps.detach() + 0.3 * torch.randn(of_steps.shape, generator=torch.Generator().manual_seed(1))
    ratio = (of_steps - old).exp()
    clipped = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    expected = -clipped.sum() / (steps * int((advantages != 0).sum()))
    # The old scores of a step, handed out to its tokens evenly.
    current = made.compared(made._score(made.model, rows_of(batch), 0, length)).detach()
    shift = (old - of_steps) / (length // steps)
    batch = {name: value for name, value in batch.items() if name not in ("scores", "old_is_current")}
    batch["old_per_token_logps"] = (current + shift.gather(-1, step))[:, None]
    found = made._compute_loss(made.model, batch)
    assert made._metrics["train"]["clip_ratio/region_mean"][-1] > 0
    assert found.item() == pytest.approx(float(expected), abs=2e-5)


def plain_tempered(trainer: Any, batch: dict[str, Any], temperature: float) -> Tensor:
    """Log-probabilities `[B, S, L]` of the canvas in the state before each step."""
    rows, found = rows_of(batch), []
    positions = (rows.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    for k in range(4):
        logits = trainer.model(
            input_ids=state(trainer, batch, k), attention_mask=rows.attention_mask, position_ids=positions
        ).logits
        shift = trainer.spec.logit_shift
        logits = logits[:, logits.shape[1] - 8 - shift : logits.shape[1] - shift] / temperature
        found.append(logits.log_softmax(-1).gather(-1, batch["canvas_ids"][..., None]).squeeze(-1))
    return torch.stack(found, dim=1).detach()


def state(trainer: Any, batch: dict[str, Any], k: int) -> Tensor:
    rows = rows_of(batch)
    canvas = torch.where(batch["commit_step"] >= k, trainer.spec.mask_token_id, batch["canvas_ids"])
    return torch.cat([rows.prompt_ids, canvas], dim=1)


def utilities_at(trainer: Any, batch: dict[str, Any], row: int, k: int, steps: int, block: Tensor) -> Tensor:
    real = rows_of(batch).attention_mask[row]
    ids = state(trainer, batch, k)[row][real][None]
    shift = trainer.spec.logit_shift
    with torch.no_grad():
        hidden = trainer.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        states = hidden[:, hidden.shape[1] - 8 - shift : hidden.shape[1] - shift]
        masked = (batch["commit_step"][row] >= k)[None]
        wrote = int((batch["commit_step"][row] == k).nonzero()[0])
        inside = (block == block[wrote])[None]
        seen = Seen(states, masked, inside, torch.ones_like(masked), torch.tensor([k / steps]))
        return trainer.unmasking_policy(seen)[0]


def test_the_denominator_counts_completions_with_an_advantage(trained: Any, losses: Any) -> None:
    """Groups whose completions are worth the same change nothing, however many there are."""
    made = trained(rewards=lambda completions, **columns: [float(i % 4 == 0) * (i < 4) for i in range(8)], max_steps=1)
    assert made.seen[0]["advantage_share"].tolist() == pytest.approx([0.5] * 8)
    assert made.state.log_history[0]["diffusion/place_log_prob"] < 0
    equal = trained(rewards=lambda completions, **columns: [1.0] * 8, max_steps=1)
    assert losses(equal) == [0.0] and all(bool(value.isfinite().all()) for value in weights(equal).values())


# --- what is trained --------------------------------------------------------------------------------------------------


def backwards(completions: list[str], rollout: Any, **columns: Any) -> list[float]:
    """The share of pairs of slots that were written from right to left."""
    step = rollout.trace.commit_step
    pairs = step[:, None, :] < step[:, :, None]
    return pairs.triu(1).sum((1, 2)).div(step.shape[1] * (step.shape[1] - 1) / 2).tolist()


def test_a_policy_alone_learns_a_known_order(trained: Any) -> None:
    """Equal utilities are written from left to right where nothing is drawn: the worst order there is."""
    model = tiny_llada()
    made = trained(
        model=model,
        rewards=backwards,
        start=False,
        train_denoiser=False,
        denoising_steps=8,
        max_steps=22,
        optim="adamw_torch",
        learning_rate=0.01,
        per_device_train_batch_size=32,
        num_generations=32,
        policy_frequencies=16,
        max_grad_norm=1.0,
        one_view=False,
    )
    greedy = DecodingConfig(
        canvas_length=8, schedule="learned_order", steps=8, temperature=1.0, schedule_args={"greedy": True}
    )

    def written() -> list[float]:
        rollout = RolloutEngine(model).generate([[17, 18, 13], [17, 18, 19, 14]], greedy, num_generations=8)
        return backwards([], rollout)

    before, at_first = weights(made), written()
    made.train()
    for name, value in weights(made).items():
        assert ("unmasking_policy" in name) or torch.equal(value, before[name]), name
    rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
    assert rewards[0] == pytest.approx(0.5, abs=0.1) and max(rewards) > 0.65
    found = written()
    assert at_first == [0.0] * 16 and sum(found) / 16 > 0.75


def test_model_and_policy_learn_together_and_with_an_adapter(trained: Any) -> None:
    made = trained(start=False)
    before = weights(made)
    made.train()
    moved = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert {"model.embed_tokens.weight", "unmasking_policy.utility.weight"} <= moved
    lora = LoraConfig(r=2, target_modules="all-linear")
    made = trained(start=False, peft_config=lora)
    before = weights(made)
    made.train()
    moved = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "unmasking_policy" in name for name in moved)
    assert any("lora_" in name for name in moved) and any("utility" in name for name in moved)
    assert not any("unmasking_policy" in name and "lora" in name for name in weights(made))


def test_gradients_of_the_policy_that_are_no_numbers_skip_the_step(trained: Any) -> None:
    made = trained(start=False, max_steps=1)
    made.unmasking_policy.utility.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = weights(made)
    made.train()
    assert made.state.log_history[0]["diffusion/skipped_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())


def test_one_view_at_a_time_changes_nothing_and_reentrant_checkpoints_neither(trained: Any) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    found = [weights(trained(**options)) for options in ({}, {"one_view": False}, reentrant)]
    for other in found[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=0, atol=1e-6)


def test_splits_and_several_passes(trained: Any, losses: Any) -> None:
    whole = trained(learning_rate=0.02)
    parts = trained(learning_rate=0.02, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)
    for name, value in weights(parts).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=1e-5)
    several = trained(num_iterations=2, max_steps=2, learning_rate=2.0)
    assert several.state.log_history[0]["clip_ratio/region_mean"] == 0
    assert several.state.log_history[1]["clip_ratio/region_mean"] > 0


def test_the_rollout_gap_is_that_of_tokens(trained: Any) -> None:
    made = trained(max_steps=1, temperature=0.8)
    assert made.state.log_history[0]["diffusion/rollout_gap"] < 0.02  # the mask token's share


def test_rows_may_stop_at_their_end_and_steps_be_sampled(trained: Any) -> None:
    """What was chosen behind the end is a part of the order that its step drew, though it is not scored."""
    made = trained(model=tiny_llada_that_ends(), scope="valid", stop_at_eos=True, block_length=4, max_steps=1)
    log = made.state.log_history[0]
    assert log["diffusion/nfe"] < 4 and log["diffusion/scored_token_share"] == 1
    assert log["diffusion/rollout_gap"] == pytest.approx(0, abs=1e-5) and log["diffusion/place_log_prob"] < 0
    made = trained(steps="sampled", num_scored_steps=2, max_steps=1)
    assert made.state.log_history[0]["diffusion/scored_steps"] == 2


# --- files and resuming -----------------------------------------------------------------------------------------------


def test_the_policy_is_saved_with_the_model_and_found_again(trained: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    base = tmp_path / "base"
    for adapter in (None, lora):
        model = tiny_llada()
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        made = trained(
            model=load_denoiser(base), peft_config=adapter, policy_layers=0, policy_heads=None, optim="adamw_torch"
        )
        *_, last = made.optimizer.param_groups
        assert {id(p) for p in last["params"]} == {id(p) for p in made.unmasking_policy.parameters()}
        folder = tmp_path / ("lora" if adapter else "full")
        made.save_model(str(folder))
        stored = folder / ("adapter_model.safetensors" if adapter else "model.safetensors")
        assert not any("unmasking_policy" in name for name in load_file(stored))
        assert load_policy(folder).settings == {**made.unmasking_policy.settings, "layers": 0}
        again = load_denoiser(folder)
        config = DecodingConfig(canvas_length=8, schedule="learned_order", steps=4)
        theirs = RolloutEngine(again).generate([[5, 6, 7]], config)
        ours = RolloutEngine(made.model).generate([[5, 6, 7]], config)
        assert torch.equal(theirs.canvas, ours.canvas) and attached_policy(again) is not None
        further = trained(model=load_denoiser(folder), policy_heads=None, start=False)
        for mine, other in zip(further.unmasking_policy.parameters(), load_policy(folder).parameters(), strict=True):
            assert torch.equal(mine, other) and mine.requires_grad
        with pytest.raises(ValueError, match="policy_layers=1 contradicts"):
            trained(model=load_denoiser(folder), policy_layers=1, start=False)
    other = trained(policy_path=str(tmp_path / "full"), policy_heads=None, start=False)
    assert other.unmasking_policy.settings["layers"] == 0


def test_a_killed_run_goes_on_in_the_middle_of_a_batch(trained: Any, losses: Any, tmp_path: Path) -> None:
    common = {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.05, "optim": "adamw_torch"}
    whole = trained(**common, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / POLICY_FILE).is_file()
    rest = trained(**common, start=False, output_dir=str(tmp_path / "rest"))
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert losses(rest)[-1] == losses(whole)[-1]
    for name, value in weights(rest).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_other_trainers_leave_a_policy_alone_and_keep_it(make_trainer: Any, tmp_path: Path) -> None:
    from rl4dlm import CJGRPOConfig, CJGRPOTrainer

    settings = {"schedule": "learned_order", "num_iterations": 1, "beta": 0.0, "temperature": 1.0}
    made = make_trainer(model=stirred(tiny_llada()), trainer=CJGRPOTrainer, config=CJGRPOConfig, **settings)
    before = weights(made)
    made.train()
    after = weights(made)
    assert all(torch.equal(after[name], before[name]) == ("unmasking_policy" in name) for name in after)
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / POLICY_FILE).is_file()
    # Where nothing asks for a policy, the one of the folder that the model was loaded from is kept.
    plain = make_trainer(model=load_denoiser(tmp_path / "saved"))
    plain.save_model(str(tmp_path / "plain"))
    kept, first = load_policy(tmp_path / "plain"), load_policy(tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), first.parameters(), strict=True))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.8, "score_temperature": 1.0}, "score_temperature=1.0 is not allowed with temperature=0.8"),
        ({"temperature": 0.0}, "temperature must be larger than 0"),
        ({"steps": "top_entropy", "num_scored_steps": 2}, "steps='top_entropy'"),
        ({"merge": 2}, "merge=2"),
        ({"value_model": "steps"}, "value_model='steps'"),
        ({"beta": 0.1}, "beta=0.1"),
        ({"cfg_scale": 1.0}, "cfg_scale=1.0"),
        ({"old_policy": "recorded"}, "old_policy='recorded'"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "load_best_model_at"),
        ({"defer_token_ids": [1]}, r"defer_token_ids=\[1\]"),
        ({"schedule_args": {"policy": "somewhere"}}, "set policy_path"),
        ({"policy_kind": "mlp"}, "policy_kind='mlp'"),
        ({"policy_kind": "linear", "policy_layers": 1}, "policy_layers=1 has no effect"),
        (
            {"policy_layers": 0, "policy_heads": 2},
            "policy_heads=2 has no effect with policy_layers=0",
        ),
        ({"policy_learning_rate": -1.0}, "policy_learning_rate=-1.0"),
        ({"aggregation": "tokens"}, "aggregation='tokens'"),
        ({"stop_at_eos": True}, "scope='canvas' is not allowed with stop_at_eos=True"),
        ({"cache": "dual"}, "cache='dual'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        LLaDOUConfig(**{"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "num_generations": 4,
                        "max_completion_length": 8, **settings})  # fmt: skip


def test_models_and_schedules_that_do_not_fit_are_refused(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schedule='low_confidence' is not allowed"):
        trained(start=False, schedule="low_confidence")
    with pytest.raises(ValueError, match="without greedy=true"):
        trained(start=False, schedule_args={"greedy": True})
    with pytest.raises(ValueError, match="looks beyond the active block"):
        trained(start=False, model=tiny_sdar(), denoising_steps=None)
    save_policy(fresh(LinearPolicy(5), seed=0), tmp_path)
    with pytest.raises(ValueError, match="of kind 'linear' with settings={'hidden_size': 5}"):
        trained(start=False, policy_path=str(tmp_path), policy_heads=None)
    with pytest.raises(ValueError, match="heads=5"):
        trained(start=False, policy_heads=5)
    with pytest.raises(ValueError, match="peft_config is not supported with train_denoiser=False"):
        trained(start=False, train_denoiser=False, peft_config=LoraConfig(target_modules=["q_proj"]))
    from rl4dlm import DACA

    with pytest.raises(ValueError, match="credit=DACA"):
        trained(start=False, credit=DACA())


def test_published_defaults(tmp_path: Path) -> None:
    config = LLaDOUConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=16)
    assert (config.num_generations, config.learning_rate, config.epsilon, config.beta) == (16, 5e-6, 0.2, 0.0)
    assert (config.temperature, config.score_temperature, config.scale_rewards) == (1.0, 1.0, "group")
    assert (config.schedule, config.scope, config.stop_at_eos) == ("learned_order", "canvas", False)
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (0.9, 0.999, 0.0, 1.0)
