"""Clips and self-normalised weights as settings of every loss with policy ratios."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rl4dlm
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.training.clipping import CLIPS, Clip, importance_weights, surrogate
from rl4dlm.training.interventions.trainer import groups
from rl4dlm.training.trainer import PolicyScores
from tests.algorithms.test_igpo import HINTS, Verifier, data
from tests.models.float64 import exactly_float64

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

GROUP = 4
TOKEN_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "diffu-grpo": ("DiffuGRPOTrainer", {"loss_type": "dapo"}),
    "diffu-grpo-rows": ("DiffuGRPOTrainer", {"loss_type": "grpo"}),
    "diffu-grpo-sequences": ("DiffuGRPOTrainer", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "coupled-grpo": ("CoupledGRPOTrainer", {}),
    "unigrpo": ("UniGRPOTrainer", {}),
    "justgrpo": ("JustGRPOTrainer", {"denoising_steps": 8}),
    "igpo": ("IGPOTrainer", {**HINTS, "hint_entropy_share": 1.0}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "espo": ("ESPOTrainer", {}),
    "gdpo": ("DiffusionGDPOTrainer", {"num_iterations": 2}),
    "gdpo-whole": ("DiffusionGDPOTrainer", {"num_iterations": 2, "ratio_norm": "none"}),
    "bgpo": ("BGPOTrainer", {"num_views": 2}),
    "dream-coder": ("DreamCoderRLTrainer", {"substitute_groups": False}),
    "cj-grpo": ("CJGRPOTrainer", {}),
}
LOSSES = TOKEN_LOSSES | OTHERS
FOUR = {name: LOSSES[name] for name in ("diffu-grpo-rows", "gdpo-whole", "bgpo", "dream-coder")}
"""One of each kind."""


def build(make_trainer: Callable[..., Any], case: tuple[str, dict[str, Any]], **changes: Any) -> Any:
    """In float64, so that a difference is one of the algorithm and not of rounding."""
    trainer = getattr(rl4dlm, case[0])
    model = exactly_float64(tiny_llada(initializer_range=0.2, dtype=torch.float64))
    values = {"model": model, "max_steps": 1, "max_grad_norm": 0.0, "beta": 0.0, **case[1], **changes}
    if trainer is rl4dlm.IGPOTrainer:
        values |= {"dataset": data(), "rewards": Verifier()}
    return make_trainer(trainer=trainer, config=trainer.config_class, **values)


def worn_batch(trainer: Any, spread: float = 0.0) -> dict[str, Any]:
    """The batch of a step that has been made, in its second pass: ratios are not 1 any more."""
    trainer.train()
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = trainer._buffered_inputs
    if spread:
        old = batch["old_per_token_logps"]
        noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(0), dtype=old.dtype)
        batch["old_per_token_logps"] = old + spread * noise
    return batch


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> list[Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return [p.grad.clone() for p in trainer.model.parameters()]


def log_of(trainer: Any, name: str) -> float:
    return float(trainer._metrics["train"][name][-1])


def moved(trainer: Any, **changes: Any) -> None:
    """Other settings for a trainer that is built."""
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    trainer.epsilon_low = trainer.args.epsilon
    trainer.epsilon_high = trainer.args.epsilon if trainer.args.epsilon_high is None else trainer.args.epsilon_high


# --- on policy, and what every clip has in common ---------------------------------------------------------------------


EACH = {name: case for name, case in LOSSES.items() if name not in ("diffu-grpo", "gdpo", "cj-grpo")}
EACH["cj-grpo-steps"] = ("CJGRPOTrainer", {"ratio_unit": "step"})


@pytest.mark.parametrize("case", EACH.values(), ids=EACH)
def test_on_policy_no_clip_matters_and_off_policy_all_do(make_trainer: Any, case: Any) -> None:
    """At equal policies all gradients are PPO's, with weights normalised or not. With an old policy they differ."""
    trainer = build(make_trainer, case, num_iterations=2)
    worn = worn_batch(trainer, spread=1.0)
    fresh = {name: value for name, value in worn.items() if name != "old_per_token_logps"}
    kinds = [("none", "none"), ("unconditional", "none"), ("unconditional", "group"), ("unconditional", "batch")]
    kinds += [] if case[0] == "BGPOTrainer" else [("log", "none")]
    moved(trainer, epsilon=0.2, epsilon_high=None)
    expected, different = loss_and_gradients(trainer, fresh), loss_and_gradients(trainer, worn)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for clip, normalised in kinds:
        moved(trainer, clip=clip, self_normalize=normalised)
        for a, b in zip(loss_and_gradients(trainer, fresh), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert log_of(trainer, "clip_ratio/region_mean") == 0
        found = loss_and_gradients(trainer, worn)
        same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, different, strict=True))
        assert same is (clip == "log")
        if clip != "none":
            assert log_of(trainer, "clip_ratio/region_mean") > 0
        if normalised != "none":
            assert 0.1 < log_of(trainer, "diffusion/effective_sample_share") < 1


@pytest.mark.parametrize("case", FOUR.values(), ids=FOUR)
def test_a_range_of_nothing_does_not_look_at_the_old_policy(make_trainer: Any, case: Any) -> None:
    trainer = build(make_trainer, case, num_iterations=2, clip="unconditional", epsilon=0.0, epsilon_high=0.0)
    worn = worn_batch(trainer, spread=1.0)
    fresh = {name: value for name, value in worn.items() if name != "old_per_token_logps"}
    for normalised in ("none", "group"):
        moved(trainer, self_normalize=normalised)
        for a, b in zip(loss_and_gradients(trainer, worn), loss_and_gradients(trainer, fresh), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


SIX = FOUR | {name: LOSSES[name] for name in ("diffu-grpo-sequences", "espo")}


@pytest.mark.parametrize("case", SIX.values(), ids=SIX)
def test_what_the_ratios_of_a_group_have_in_common_cancels(make_trainer: Any, case: Any) -> None:
    """A constant in all of a group's log-ratios: nothing with self-normalised weights, a factor without."""
    trainer = build(
        make_trainer, case, num_iterations=2, clip="unconditional", epsilon=1.0, epsilon_high=math.inf,
        self_normalize="group",
    )  # fmt: skip
    batch = worn_batch(trainer, spread=0.3)
    first = groups(batch["row_ids"], GROUP) == groups(batch["row_ids"], GROUP)[0]
    old = batch["old_per_token_logps"]
    constant = torch.full_like(old, 0.5)
    if case[0] in ("ESPOTrainer", "DiffusionGDPOTrainer", "BGPOTrainer"):  # of sums, which lengths divide
        size = trainer.tokens_scored(batch) if case[0] == "BGPOTrainer" else batch["completion_mask"].sum(-1)
        whole = 0.5 * (size if case[1].get("ratio_norm") != "none" else torch.ones_like(size))
        constant = torch.zeros_like(old)
        if case[0] == "BGPOTrainer":
            constant += whole[:, None, None]
        else:
            constant[..., 0] = whole[:, None]
    shifted = {**batch, "old_per_token_logps": torch.where(first[:, None, None], old - constant, old)}
    plain, other = (loss_and_gradients(trainer, each) for each in (batch, shifted))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    moved(trainer, self_normalize="none")
    plain, other = (loss_and_gradients(trainer, each) for each in (batch, shifted))
    assert max(float((a - b).abs().max()) for a, b in zip(plain, other, strict=True)) > 1e-4


# --- TRL's loss under another clip ------------------------------------------------------------------------------------


def loss_batch(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Scores whose policy ratios are given, and a batch in TRL's form."""
    scores = torch.full_like(log_ratio, -1.5).requires_grad_()
    nothing = torch.zeros(len(mask), 1, dtype=torch.long)
    return scores, {
        "prompt_ids": nothing,
        "prompt_mask": nothing + 1,
        "completion_ids": torch.full(mask.shape, 9),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": scores.detach() - log_ratio,
        "ref_per_token_logps": scores.detach() + 0.3,
        "num_items_in_batch": mask.sum(),
        "row_ids": torch.arange(len(mask)),
    }


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1]] * 5 + [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trls_loss_has_the_gradient_of_the_surrogate_averaged_as_it_averages(make_trainer: Any, level: str) -> None:
    trainer = build(make_trainer, LOSSES["diffu-grpo"], importance_sampling_level=level, epsilon=0.5)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    advantages, log_ratio = numbers(8, seed=1), numbers(8, 5)
    scores, batch = loss_batch(log_ratio, advantages, MASK)
    units, of_which = log_ratio + scores - scores.detach(), scores
    if level == "sequence":
        units, of_which = (
            (each * MASK).sum(-1, keepdim=True) / MASK.sum(-1, keepdim=True).clamp(min=1) for each in (units, scores)
        )
    for kind, loss_type in itertools.product(CLIPS, ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")):
        moved(trainer, clip=kind)
        trainer.loss_type = loss_type
        loss = trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch)
        (found,) = torch.autograd.grad(loss, scores)
        each = surrogate(units, of_which, advantages[:, None], Clip(kind, 0.5)).expand(8, 5)
        averaged = trainer.averaged(each, MASK, batch)
        (expected,) = torch.autograd.grad(averaged, scores, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14, msg=f"{kind} {loss_type}")
        if kind != "unconditional":
            assert loss.item() == pytest.approx(averaged.item())


def test_metrics_of_clips_are_those_of_trl(make_trainer: Any) -> None:
    """PPO's from TRL and log's from here are the same numbers, at both levels."""
    for level in ("token", "sequence"):
        trainer = build(make_trainer, LOSSES["diffu-grpo"], importance_sampling_level=level, epsilon=0.3)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        scores, batch = loss_batch(numbers(7, 5), numbers(7, seed=1), MASK[:7])
        logged = []
        for kind in ("ppo", "log"):
            moved(trainer, clip=kind)
            trainer._metrics["train"].clear()
            trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch)
            logged.append({k: v for k, v in trainer._metrics["train"].items() if k.startswith("clip_ratio")})
        assert all(len(values) == 1 for values in logged[1].values())
        assert {k: pytest.approx(v) for k, v in logged[0].items()} == logged[1]
        assert logged[1]["clip_ratio/region_mean"][0] > 0.1


@pytest.mark.parametrize("corrected", [False, True])
def test_the_kl_term_does_not_depend_on_the_clip(make_trainer: Any, corrected: bool) -> None:
    gradients = []
    for clip in ("ppo", "unconditional"):
        trainer = build(
            make_trainer, LOSSES["diffu-grpo"], beta=0.5, use_bias_correction_kl=corrected, clip=clip, epsilon=0.0
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        scores, batch = loss_batch(numbers(8, 5), torch.zeros(8).double(), MASK)
        loss = trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch)
        gradients.append(torch.autograd.grad(loss, scores)[0])
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)


def test_the_off_policy_mask_sees_the_old_policy_whatever_the_clip(make_trainer: Any) -> None:
    kept = []
    for clip in ("ppo", "unconditional", "log", "none"):
        trainer = build(make_trainer, LOSSES["diffu-grpo"], off_policy_mask_threshold=0.1, clip=clip)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        scores, batch = loss_batch(0.3 * numbers(8, 5), -torch.ones(8).double(), MASK)
        loss = trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch)
        kept.append((torch.autograd.grad(loss, scores)[0] != 0).any(-1).tolist())
    assert kept[0] == kept[1] == kept[2] == kept[3] and 0 < sum(kept[0]) < 7


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_estimate_gone_wrong_moves_ppo_without_bound_and_the_others_no_further_than_the_range(
    make_trainer: Any, level: str
) -> None:
    """F4 of the spec, at a completion with a negative advantage."""
    sizes: dict[str, list[float]] = {}
    for name, settings in {
        "ppo": {"clip": "ppo", "epsilon": 0.2},
        "unconditional": {"clip": "unconditional", "epsilon": 1.0, "epsilon_high": 4.0},
        "normalised": {"clip": "unconditional", "epsilon": 1.0, "epsilon_high": math.inf, "self_normalize": "group"},
    }.items():
        trainer = build(make_trainer, LOSSES["diffu-grpo"], importance_sampling_level=level, **settings)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        for wrong in (5.0, 10.0, 15.0):
            log_ratio = torch.zeros(8, 5, dtype=torch.float64)
            log_ratio[2] = wrong
            advantages = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2).double()
            scores, batch = loss_batch(log_ratio, advantages, torch.ones_like(MASK))
            loss = trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch)
            sizes.setdefault(name, []).append(float(torch.autograd.grad(loss, scores)[0].abs().max()) * 40)
    assert sizes["ppo"] == pytest.approx([math.exp(wrong) for wrong in (5.0, 10.0, 15.0)])
    assert sizes["unconditional"] == pytest.approx([5.0] * 3)
    assert max(sizes["normalised"]) <= GROUP


# --- which completions are together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FOUR.values(), ids=FOUR)
def test_rows_without_an_advantage_are_scored_for_those_of_their_group_that_have_one(
    make_trainer: Any, case: Any
) -> None:
    """Their ratios are in the mean; a group without any advantage is still not scored, and nothing changes."""
    trainer = build(make_trainer, case, num_iterations=2, clip="unconditional", self_normalize="group")
    batch = worn_batch(trainer, spread=0.3)
    first = groups(batch["row_ids"], GROUP) == groups(batch["row_ids"], GROUP).min()
    batch["advantages"] = torch.where(first, batch["row_ids"] % 2, 0).to(batch["advantages"])
    assert batch.pop("rows_weighed").all()  # of the advantages that were
    found = loss_and_gradients(trainer, batch)
    assert log_of(trainer, "diffusion/rows_scored_share") == 0.5
    trainer._kept = lambda batch, log=False: None
    for a, b in zip(found, loss_and_gradients(trainer, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(float(g.abs().max()) for g in found) > 1e-3


SPLITS = {
    "whole groups": (4, 2, {}),
    "halves": (2, 4, {}),
    "halves that are equal views": (2, 4, {"p_mask_prompt": 0.0}),
    "two steps a pass": (2, 2, {"steps_per_generation": 4, "max_steps": 4}),
    "two passes a step": (2, 8, {"steps_per_generation": 4, "num_iterations": 4}),
}


@pytest.mark.parametrize(("name", "kind"), [*((name, "group") for name in SPLITS), ("halves", "batch")])
def test_weights_do_not_depend_on_micro_batches(make_trainer: Any, name: str, kind: str) -> None:
    """Those that completions get are those from all that share a mean, under the policy of the step."""
    size, parts, changes = SPLITS[name]
    trainer = build(
        make_trainer, LOSSES["diffu-grpo-rows"], clip="unconditional", self_normalize=kind, epsilon_high=math.inf,
        per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        **{"num_iterations": 2, "max_steps": 2, **changes},
    )  # fmt: skip
    by_step: dict[int, dict[int, Tensor]] = {}
    found, unit_weights = [], trainer.unit_weights

    def checked(log_ratio: Tensor, counts: Tensor, batch: dict[str, Any]) -> Tensor:
        weights = unit_weights(log_ratio, counts, batch)
        if trainer._collected is None:
            plain = importance_weights(log_ratio, trainer.clip)
            found.append((trainer._step, trainer.state.global_step, batch["row_ids"], counts, plain, weights))
        return weights

    trainer.unit_weights = checked
    trainer.train()
    length = trainer.args.steps_per_generation
    for step, _, rows, counts, _, weights in found:  # the members of a mean are in the same pass, if in other steps
        if step < length:
            assert torch.equal(weights, torch.ones_like(weights)) or name == "two steps a pass"
        for row, w, c in zip(rows.tolist(), weights, counts, strict=True):
            by_step.setdefault(step // length, {})[row] = w[c]
    if name != "two steps a pass":
        for rows_of_pass in by_step.values():
            assert len(rows_of_pass) == 8
            for group in (range(4), range(4, 8)) if kind == "group" else (range(8),):
                assert torch.cat([rows_of_pass[row] for row in group]).mean().item() == pytest.approx(1.0)
    assert max(float((w - 1).abs().max()) for *_, w in found) > 0.01


def test_on_policy_nothing_is_scored_once_more(make_trainer: Any) -> None:
    trainer = build(
        make_trainer, LOSSES["diffu-grpo"], clip="unconditional", self_normalize="group", num_iterations=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert trainer.weights_are_split
    trainer._weigh_all = None
    trainer.train()
    assert trainer.state.log_history[0]["diffusion/effective_sample_share"] == 1


SPLIT = {"bgpo": LOSSES["bgpo"], "dream-coder": LOSSES["dream-coder"]}
SPLIT["cj-grpo-recorded"] = ("CJGRPOTrainer", {"old_policy": "recorded"})


@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT)
def test_splitting_a_batch_changes_nothing(make_trainer: Any, case: Any) -> None:
    weights, logged = [], []
    for size, parts in ((8, 1), (2, 4)):
        trainer = build(
            make_trainer, case, num_iterations=2, max_steps=2, clip="unconditional", self_normalize="group",
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        )  # fmt: skip
        trainer.train()
        logged.append(trainer.state.log_history[1]["diffusion/effective_sample_share"])
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert logged[0] == pytest.approx(logged[1]) and logged[0] < 1
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("length", "accumulated"), [(4, 1), (2, 3)])
def test_groups_are_whole_in_every_micro_batch(make_trainer: Any, length: int, accumulated: int) -> None:
    trainer = build(
        make_trainer, LOSSES["diffu-grpo"], clip="unconditional", self_normalize="group", loss_type="bnpo",
        per_device_train_batch_size=GROUP, steps_per_generation=length, gradient_accumulation_steps=accumulated,
        max_steps=4, num_iterations=2,
    )  # fmt: skip
    seen: list[list[int]] = []
    loss = trainer.loss
    trainer.loss = lambda scores, batch: (seen.append(batch["row_ids"].tolist()), loss(scores, batch))[1]
    trainer.train()
    assert len(seen) == 4 * accumulated
    assert all(sorted(rows) == list(range(min(rows), min(rows) + GROUP)) for rows in seen)


def test_copies_of_a_group_are_whole_groups(make_trainer: Any) -> None:
    trainer = build(
        make_trainer, LOSSES["diffu-grpo"], clip="unconditional", self_normalize="group",
        per_device_train_batch_size=GROUP, steps_per_generation=3,
    )  # fmt: skip
    found = trainer._groups_together({"row_ids": torch.tensor([5, 1, 5, 4, 7, 0, 4, 2, 6, 7, 3, 6])})["row_ids"]
    assert sorted(map(sorted, found.view(3, GROUP).tolist())) == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]


# --- settings ---------------------------------------------------------------------------------------------------------

SIZES = {"num_generations": 4, "per_device_train_batch_size": 8, "output_dir": "run", "bf16": False, "use_cpu": True}
UNCONDITIONAL = {"clip": "unconditional"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "hard"}, "clip='hard' is not allowed; choose one of ppo, log, unconditional, none"),
        ({"self_normalize": "row"}, "self_normalize='row' is not allowed; choose one of none, group, batch"),
        (
            {"self_normalize": "group"},
            "self_normalize='group' is not allowed with clip='ppo', whose ratios",
        ),
        ({"epsilon": -0.1}, "epsilon=-0.1 is not allowed; it must be 0 or larger"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1 is not allowed; it must be 0 or larger"),
        ({**UNCONDITIONAL, "delta": 3.0}, "delta=3.0 has no effect with clip='unconditional'; leave it out"),
        ({"clip": "none", "epsilon": 0.1}, "epsilon=0.1 has no effect with clip='none'; leave it out"),
        ({"clip": "none", "delta": 3.0}, "delta=3.0 has no effect with clip='none'"),
        *(
            ({**UNCONDITIONAL, "loss_type": name}, f"clip='unconditional' is not allowed with loss_type='{name}'")
            for name in ("cispo", "sapo", "vespo")
        ),
    ],
)
def test_settings_that_do_nothing_or_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rl4dlm.DiffuGRPOConfig(**{**SIZES, **settings})


@pytest.mark.parametrize("name", ["SPGConfig", "WD1Config", "DMPOConfig"])
def test_losses_without_a_ratio_refuse_what_is_done_with_it(name: str) -> None:
    for setting, value in (("clip", "unconditional"), ("self_normalize", "group")):
        with pytest.raises(ValueError, match=f"{setting}='{value}' is not supported: the loss has no policy ratio"):
            getattr(rl4dlm, name)(**SIZES, **{setting: value})


def test_a_bound_of_a_ratio_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="clip='log' is not allowed: BGPO's bound of a ratio"):
        rl4dlm.BGPOConfig(**SIZES, clip="log")
