"""What holds for every trainer: micro-batches, the order of completions and what rewards have in common change nothing.

All of it in float64, where a difference is one of the algorithm and not of rounding. Rewards are eighths, so that means
of groups are exact in the float32 that TRL keeps rewards in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rl4dlm
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.noise import KeyedNoise
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.interventions.trainer import places
from rl4dlm.training.trainer import rows_of
from tests.algorithms.test_igpo import HINTS, Verifier, data
from tests.models.float64 import exactly_float64
from tests.training.steps import one_step, recording

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

GROUP = 4
EOS = 1


class Case(NamedTuple):
    """A trainer and its settings besides the small ones of `conftest.py`."""

    trainer: str
    settings: dict[str, Any]


CASES = {
    "diffu-grpo": Case("DiffuGRPOTrainer", {}),
    "diffu-grpo-sequences": Case("DiffuGRPOTrainer", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "diffu-grpo-constant": Case("DiffuGRPOTrainer", {"loss_type": "dr_grpo", "kl_estimator": "k2"}),
    "diffu-grpo-old": Case(
        "DiffuGRPOTrainer", {"kl_target": "old", "kl_estimator": "k1", "use_bias_correction_kl": True}
    ),
    "diffu-grpo-strata": Case("DiffuGRPOTrainer", {"num_strata": 3}),
    "coupled-grpo": Case("CoupledGRPOTrainer", {"baseline": "leave_one_out"}),
    "unigrpo": Case("UniGRPOTrainer", {}),
    "spg": Case("SPGTrainer", {"block_length": 4}),
    "stabledrl": Case("StableDRLTrainer", {"block_length": 4}),
    "diffu-grpo-normalised": Case("DiffuGRPOTrainer", {"clip": "unconditional", "self_normalize": "batch"}),
    "diffusion-gdpo": Case("DiffusionGDPOTrainer", {"beta": 0.04}),
    "espo": Case("ESPOTrainer", {"beta": 0.04}),
    "gdsd": Case("GDSDTrainer", {"beta": 0.04}),
    "gdsd-tokens": Case(
        "GDSDTrainer",
        {"beta": 0.0, "unit": "token", "target": "centred_logit", "weights": "elbo", "residual": "huber"},
    ),
    "bgpo": Case("BGPOTrainer", {"beta": 0.04, "num_views": 2}),
    "dmpo": Case("DMPOTrainer", {"alpha": 0.5, "num_views": 2}),
    "dmpo-ddo": Case("DMPOTrainer", {"objective": "ddo", "weight_baseline": "none", "num_views": 2}),
    "self-distillation": Case("SelfDistillationTrainer", {"rewarded_from": 0.5, "hard_weight": 0.5}),
    "self-distillation-full": Case(
        "SelfDistillationTrainer",
        {"teacher_view": "suffix", "distill_top_k": None, "hard_weight": 0.5, "block_length": 4, "states": "recorded"},
    ),
    "wd1": Case("WD1Trainer", {}),
    "wd1-predictions": Case("WD1Trainer", {"num_predicted_steps": 2}),
    "wd1-batch": Case("WD1Trainer", {"weights_over": "batch"}),
    "justgrpo": Case("JustGRPOTrainer", {"denoising_steps": 8, "beta": 0.04}),
    "dream-coder": Case("DreamCoderRLTrainer", {"beta": 0.02}),
    "dream-coder-all-tokens": Case("DreamCoderRLTrainer", {"cart_p": None, "substitute_groups": False}),
    "igpo": Case("IGPOTrainer", {**HINTS, "beta": 0.04}),
    "cj-grpo-steps": Case("CJGRPOTrainer", {"ratio_unit": "step", "kl_unit": "step", "aggregation": "step_sums"}),
    "tracerl": Case("TraceRLTrainer", {"merge": 2}),
    "tracerl-values": Case(
        "TraceRLTrainer", {"value_model": "steps", "value_target": "advantage", "value_clip": None, "gae_lambda": 0.9}
    ),
    "cj-grpo-block-values": Case(
        "CJGRPOTrainer",
        {
            "value_model": "blocks",
            "block_length": 4,
            "value_rewards": "revealed",
            "value_target": "advantage",
            "value_trains_trunk": True,
        },
    ),
    "agrpo-recorded": Case("AGRPOTrainer", {"num_scored_steps": 2, "old_policy": "recorded", "aggregation": "steps"}),
    "dipo": Case("DiPOTrainer", {"denoising_steps": None, "beta": 0.04, "schedule_args": {"threshold": 0.05}}),
    "mdpo": Case("MDPOTrainer", {"num_trained_steps": 2, "num_iterations": 2}),
    "tree-rpo": Case("TreeRPOTrainer", {"branches": [2, 2], "distillation": 0.1, "distillation_steps": 2}),
    "ebpo": Case("EBPOTrainer", {"beta": 0.04, "num_views": 2}),
    "lightningrl": Case(
        "LightningRLTrainer", {"accuracy_from": 0.5, "min_speed_range": 0.0, "speed_reward": "eighths"}
    ),
    "lightningrl-sequences": Case(
        "LightningRLTrainer",
        {
            "accuracy_from": 0.5,
            "min_speed_range": 0.0,
            "speed_reward": "eighths",
            "loss_type": "dapo",
            "kl_average": "sequence",
            "nll_average": "sequence",
            "kl_estimator": "k2",
        },
    ),
    "egspo-sa": Case("EGSPOTrainer", {"num_scored_steps": 2, "step_lambda": 0.5}),
}
WHOLE_GROUPS = {
    "dmpo-unbiased": Case("DMPOTrainer", {"alpha": 0.5, "num_views": 2, "weight_baseline": "unbiased"}),
}
"""For steps that see all of a group: micro-batches are refused."""


def denoiser() -> Any:
    """A denoiser in float64 whose completions end early here and there."""
    model = exactly_float64(tiny_llada(initializer_range=0.2, dtype=torch.float64))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        hidden = model.base_model(torch.full((1, 8), 2)).last_hidden_state.mean((0, 1))
        head[EOS] += 2.0 * hidden / hidden.norm() ** 2
    return model


def eighths(completions: list[str], **columns: Any) -> list[float]:
    """Some number that depends on every character."""
    return [sum(map(ord, text)) % 8 / 8 for text in completions]


def halves(completions: list[str], **columns: Any) -> list[float]:
    """Right or wrong, by every character."""
    return [sum(map(ord, text)) // 8 % 2 for text in completions]


def one_dull_group(completions: list[str], **columns: Any) -> list[float]:
    """`eighths`, but for the first group, which teaches nothing."""
    return [0.5 if i < GROUP else reward for i, reward in enumerate(eighths(completions))]


def build(make_trainer: Callable[..., Any], case: Case, **changes: Any) -> Any:
    """A trainer of a case, in float64; IGPO's replaces two completions of each group."""
    trainer = getattr(rl4dlm, case.trainer)
    values: dict[str, Any] = {"model": denoiser(), "rewards": eighths, "max_grad_norm": 0.0, **case.settings}
    if trainer is rl4dlm.IGPOTrainer:
        values |= {"dataset": data(), "rewards": Verifier()}
    if trainer is rl4dlm.LightningRLTrainer:
        values["rewards"] = [halves, eighths]
    if case.settings.get("substitute_groups", True) and trainer is rl4dlm.DreamCoderRLTrainer:
        values["rewards"] = one_dull_group
    return make_trainer(trainer=recording(trainer), config=trainer.config_class, **{**values, **changes})


def weights_after(trainer: Any) -> dict[str, Tensor]:
    """The weights at the end of a run, which has changed them and has seen completions of different lengths."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    lengths = torch.cat([record["canvas_valid"].sum(-1) for record in trainer.seen])
    assert len(lengths.unique()) > 1, "completions end at different places"
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(p.dtype == torch.float64 for p in after.values())
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    return after


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_splitting_a_batch_changes_nothing(make_trainer: Any, case: Case) -> None:
    """Two optimizer steps on a batch of two groups, whole or in four pieces, which are no whole groups."""
    whole = build(make_trainer, case, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    split = build(make_trainer, case, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    found = weights_after(whole), weights_after(split)
    again = 4 if split.weights_are_split else 0  # losses of the second pass that say what weights are normalised by
    assert (len(whole.seen), len(split.seen)) == (2, 8 + again)
    if case.trainer == "IGPOTrainer":
        assert [int(record["replaced"].sum()) for record in whole.seen] == [4, 4]
    assert largest_difference(*found) < 1e-10


def loss_and_gradient(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = trainer._compute_loss(trainer.model, batch)
    trained = dict(trainer.model.named_parameters())
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("case", (CASES | WHOLE_GROUPS).values(), ids=CASES | WHOLE_GROUPS)
def test_the_order_of_a_batch_does_not_matter(make_trainer: Any, case: Case) -> None:
    """Loss and gradient of a finished batch in its second pass, where ratios are not 1."""
    trainer = build(make_trainer, case, max_steps=1)
    trainer.train()
    (batch,) = trainer._buffered_inputs
    groups = places(batch["row_ids"]).argsort(stable=True).view(-1, GROUP)
    loss, gradient = loss_and_gradient(trainer, batch)
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3
    for order in (groups.flatten(), groups.roll(1, dims=1).flatten()):
        moved = {
            name: value[order] if isinstance(value, Tensor) and value.dim() and len(value) == len(order) else value
            for name, value in batch.items()
        }
        assert not torch.equal(moved["row_ids"], batch["row_ids"])
        other_loss, other_gradient = loss_and_gradient(trainer, moved)
        assert float((loss - other_loss).abs()) < 1e-12 * max(1.0, float(loss.abs()))
        assert largest_difference(gradient, other_gradient) < 1e-11


def members_rotated(rollout: Rollout) -> Rollout:
    """The same completions, each group's in another order."""
    order = torch.arange(len(rollout)).view(-1, GROUP).roll(1, dims=1).flatten().tolist()
    return rollout.replaced(dict(enumerate(order)), rollout)


# IGPO's attempts take the places of a group's first members, whichever these are, and a completion's place is that in
# d-TreeRPO's tree; the others differ in the loss alone.
LEFT_OUT = (
    "igpo", "tree-rpo", "diffu-grpo-normalised", "diffu-grpo-sequences", "diffu-grpo-constant", "diffu-grpo-old",
    "dream-coder-all-tokens", "diffu-grpo-strata",
)  # fmt: skip
ROTATED = {name: case for name, case in (CASES | WHOLE_GROUPS).items() if name not in LEFT_OUT} | {
    "igpo-without-wrong-groups": Case("IGPOTrainer", {**HINTS, "beta": 0.04, "correct_from": -1.0})
}


@pytest.mark.parametrize("case", ROTATED.values(), ids=ROTATED)
def test_the_order_of_completions_in_their_group_does_not_matter(make_trainer: Any, case: Case) -> None:
    """Rewards, advantages, scores of fixed policies and two steps, of completions that are handed on in two orders."""
    rewards = {"rewards": eighths} if case.trainer == "IGPOTrainer" else {}
    plain, rotated = (build(make_trainer, case, **rewards) for _ in range(2))
    rollout = rotated.rollout
    rotated.rollout = lambda prompts: members_rotated(rollout(prompts))
    found = weights_after(plain), weights_after(rotated)
    assert sorted(plain.seen[0]["row_ids"].tolist()) == sorted(rotated.seen[0]["row_ids"].tolist())
    assert largest_difference(*found) < 1e-10


# --- what rewards have in common, where `test_reward_shifts.py` does not look -----------------------------------------


def constant(value: float) -> Callable[..., list[float]]:
    return lambda completions, **columns: [value] * len(completions)


def shifted(rewards: Callable[..., list[float]], by: float) -> Callable[..., list[float]]:
    return lambda completions, **columns: [reward + by for reward in rewards(completions)]


IGPO = {**HINTS, "dataset": data}
SHIFTED: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[], Any]]] = {
    "dream-coder": ("DreamCoderRLTrainer", {}, {}, lambda: eighths),
    "dream-coder-substitution": ("DreamCoderRLTrainer", {}, {}, lambda: one_dull_group),
    "igpo-without-wrong-groups": (
        "IGPOTrainer",
        {**IGPO, "correct_from": -1.0},
        {"correct_from": -1.0},
        lambda: eighths,
    ),
    "igpo-wrong-groups": ("IGPOTrainer", {**IGPO, "correct_from": 1.0}, {"correct_from": 4.0}, Verifier),
}
"""Trainer, settings, what else moves with the rewards, and rewards: IGPO's limit of what is right is one of rewards."""


def gradients(make_trainer: Any, name: str, rewards: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    values = {key: value() if key == "dataset" else value for key, value in settings.items()}
    return one_step(
        make_trainer, getattr(rl4dlm, name), model=denoiser(), rewards=rewards, beta=0.0, num_iterations=1, **values
    )


@pytest.mark.parametrize("case", SHIFTED.values(), ids=SHIFTED)
def test_adding_a_constant_to_all_rewards_changes_nothing(make_trainer: Any, case: Any) -> None:
    name, settings, moving, rewards = case
    plain, first = gradients(make_trainer, name, rewards(), settings)
    other, second = gradients(make_trainer, name, shifted(rewards(), 3.0), {**settings, **moving})
    if rewards is Verifier:
        assert [int(t.seen[0]["replaced"].sum()) for t in (plain, other)] == [4, 4]
    torch.testing.assert_close(plain.seen[0]["advantages"], other.seen[0]["advantages"], rtol=0, atol=0)
    assert max(float(g.abs().max()) for g in first.values()) > 1e-3
    assert largest_difference(first, second) < 1e-12


EQUAL = {name: case for name, case in SHIFTED.items() if name != "dream-coder-substitution"}


@pytest.mark.parametrize("value", [0.7, 3.0])
@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_equal_rewards_teach_nothing(make_trainer: Any, case: Any, value: float) -> None:
    """Also where IGPO makes attempts: none of them is right."""
    name, settings, _, _ = case
    trainer, found = gradients(make_trainer, name, constant(value), settings)
    if name == "IGPOTrainer":
        tried = value < settings["correct_from"]
        assert trainer.state.log_history[0]["intervention/group_share"] == float(tried)
        assert not trainer.seen[0]["replaced"].any()
    assert not any(gradient.any() for gradient in found.values())


# --- JustGRPO at another temperature ----------------------------------------------------------------------------------


class Keeping(rl4dlm.JustGRPOTrainer):
    """Keeps its last rollout."""

    def rollout(self, prompts: list[Any]) -> Rollout:
        self.kept = super().rollout(prompts)
        return self.kept


def tempered_logits(trainer: Any, batch: dict[str, Any], tokens_per_view: int, temperature: float) -> Tensor:
    """The model's plain logits over the temperature, `[B, L, V]`, given the prompt and the tokens of earlier steps."""
    rows = rows_of(batch)
    positions = (rows.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    prompt, length = rows.prompt_ids.shape[1], rows.canvas_ids.shape[1]
    each = []
    for start in range(0, length, tokens_per_view):
        ids = rows.ids.clone()
        ids[:, prompt + start :] = trainer.spec.mask_token_id
        logits = trainer.model(input_ids=ids, attention_mask=rows.attention_mask, position_ids=positions).logits
        each.append(logits[:, prompt + start : prompt + start + tokens_per_view])
    return torch.cat(each, dim=1) / temperature


@pytest.mark.parametrize("tokens_per_view", [1, 2])
def test_scores_are_of_the_tempered_distribution_that_tokens_were_drawn_from(
    make_trainer: Any, tokens_per_view: int
) -> None:
    heat = {"temperature": 0.6, "score_temperature": 0.6}
    settings: dict[str, Any] = {"tokens_per_view": tokens_per_view, "denoising_steps": None, "beta": 0.0, **heat}
    trainer, _ = one_step(make_trainer, Keeping, model=denoiser(), rewards=eighths, num_iterations=1, **settings)
    record, mask_id = trainer.seen[0], trainer.spec.mask_token_id
    counted = record["completion_mask"].bool()
    canvas = record["canvas_ids"][:, : counted.shape[1], None]
    with torch.no_grad():
        logits = tempered_logits(trainer, record, tokens_per_view, 0.6)
    log_probs = logits.log_softmax(-1)[:, : counted.shape[1]]
    expected = log_probs.gather(-1, canvas).squeeze(-1)
    assert (record["scores"] - expected)[counted].abs().max() < 1e-12
    assert (logits * 0.6).log_softmax(-1)[:, : counted.shape[1]].gather(-1, canvas).squeeze(-1)[counted].sub(
        expected[counted]
    ).abs().max() > 0.1, "another temperature is told apart"

    # They were drawn from it, without the mask token: inverting that distribution gives the same tokens again.
    drawable = logits.softmax(-1).index_fill(-1, torch.tensor([mask_id]), 0.0)[:, : counted.shape[1]]
    row, slot = counted.nonzero(as_tuple=True)
    again = KeyedNoise(trainer.args.seed).draw(
        drawable[row, slot], record["row_ids"][row], slot // tokens_per_view, slot
    )
    assert torch.equal(again, record["canvas_ids"][row, slot])

    # What the rollout noted is the score, over the probability of anything but the mask token.
    order = torch.tensor([trainer.kept.row_ids.index(i) for i in record["row_ids"].tolist()])
    noted = trainer.kept.trace.log_prob[order][:, : counted.shape[1]]
    left = torch.log1p(-log_probs[..., mask_id].exp())
    assert (noted - (record["scores"] - left))[counted].abs().max() < 1e-12
