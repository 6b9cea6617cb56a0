"""What changes nothing is not computed: completions without an advantage, and the first pass's old policy."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rl4dlm
from rl4dlm import DiffuGRPOTrainer
from rl4dlm.models.tiny import tiny_llada
from tests.algorithms.test_igpo import HINTS, Verifier, data
from tests.launch import launch
from tests.models.float64 import exactly_float64
from tests.training import waste_worker

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

NO_KL = {"beta": 0.0}
LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "diffu-grpo": ("DiffuGRPOTrainer", NO_KL),
    **{
        f"diffu-grpo-{kind}": ("DiffuGRPOTrainer", {**NO_KL, "loss_type": kind, **more})
        for kind, more in {
            "grpo": {"importance_sampling_level": "sequence"}, "bnpo": {"delta": 2.0}, "dr_grpo": {}, "luspo": {},
            "sapo": {}, "cispo": {"epsilon_high": 5.0}, "vespo": {}, "dapo": {"off_policy_mask_threshold": 0.1},
        }.items()
    },
    "coupled-grpo": ("CoupledGRPOTrainer", NO_KL),
    "one-view": ("CoupledGRPOTrainer", {**NO_KL, "one_view": True}),
    "re-entrant": (
        "CoupledGRPOTrainer",
        {**NO_KL, "one_view": True, "activation_checkpointing": True,
         "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "unigrpo": ("UniGRPOTrainer", NO_KL),
    "justgrpo": ("JustGRPOTrainer", {**NO_KL, "denoising_steps": 8}),
    "espo": ("ESPOTrainer", NO_KL),
    "gdpo": ("DiffusionGDPOTrainer", {"num_iterations": 2}),
    "bgpo": ("BGPOTrainer", {"num_views": 3}),
    "spg": ("SPGTrainer", {"block_length": 4}),
    "spg-positive": ("SPGTrainer", {"block_length": 4, "negatives": "zero"}),
    "stabledrl": ("StableDRLTrainer", {"block_length": 4, "self_normalize": "none"}),
    "unconditional": ("DiffuGRPOTrainer", {**NO_KL, "clip": "unconditional"}),
    "wd1": ("WD1Trainer", {}),
    "dmpo": ("DMPOTrainer", {"alpha": 0.5, "num_views": 2}),
    "dream-coder": ("DreamCoderRLTrainer", {"substitute_groups": False}),
    "igpo": ("IGPOTrainer", {**HINTS, **NO_KL, "hint_entropy_share": 1.0}),
    "cj-grpo": ("CJGRPOTrainer", NO_KL),
    "agrpo": ("AGRPOTrainer", {"num_scored_steps": 2, "old_policy": "recorded"}),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("DiffuGRPOTrainer", {"beta": 0.04}),
    "old-kl": ("DiffuGRPOTrainer", {"beta": 0.04, "kl_target": "old", "kl_estimator": "k2"}),
    "entropy": ("DiffuGRPOTrainer", {**NO_KL, "entropy_coef": 0.01}),
    "entropic-tokens": ("DiffuGRPOTrainer", {**NO_KL, "top_entropy_quantile": 0.5}),
    "espo-kl": ("ESPOTrainer", {"beta": 0.1}),
    "bgpo-kl": ("BGPOTrainer", {"beta": 0.1}),
    "dream-coder-kl": ("DreamCoderRLTrainer", {"beta": 0.1}),
    "dmpo-unbiased": ("DMPOTrainer", {"weight_baseline": "unbiased"}),
    "dmpo-ddo": ("DMPOTrainer", {"objective": "ddo", "weight_baseline": "none"}),
}


@contextmanager
def scored_rows(trainer: Any) -> Iterator[list[int]]:
    """Completions that are asked about in each call for scores under gradients."""
    counts: list[int] = []
    score = trainer._view_scores

    def counting(model: Any, rows: Any, *rest: Any, **more: Any) -> Any:
        counts.append(len(rows))
        return score(model, rows, *rest, **more)

    trainer._view_scores = counting
    try:
        yield counts
    finally:
        del trainer._view_scores


def build(make_trainer: Callable[..., Any], case: tuple[str, dict[str, Any]], **changes: Any) -> Any:
    """In float64, so that a difference is one of the algorithm and not of rounding."""
    trainer = getattr(rl4dlm, case[0])
    model = exactly_float64(tiny_llada(initializer_range=0.2, dtype=torch.float64))
    values = {"model": model, "max_steps": 1, "max_grad_norm": 0.0, **case[1], **changes}
    if trainer is rl4dlm.IGPOTrainer:
        values |= {"dataset": data(), "rewards": Verifier()}
    return make_trainer(trainer=trainer, config=trainer.config_class, **values)


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> list[Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())]


def worn_batch(trainer: Any) -> dict[str, Any]:
    """The batch of a step that has been made: ratios are not 1 any more. Half of the rows have no advantage."""
    trainer.train()
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = trainer._buffered_inputs
    batch["advantages"] = torch.tensor([0.7, 0.0, 0.0, -0.4, -1.1, 0.0, 0.3, 0.0], dtype=torch.float64)
    return batch


@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_rows_without_an_advantage_are_not_scored_and_nothing_changes(make_trainer: Any, case: Any) -> None:
    trainer = build(make_trainer, case)
    batch = worn_batch(trainer)
    with scored_rows(trainer) as counts:
        found = loss_and_gradients(trainer, batch)
    positive = case[1].get("negatives") == "zero"
    assert counts and set(counts) == {2 if positive else 4}
    share = trainer._metrics["train"]["diffusion/rows_scored_share"][-1]
    assert share == (0.25 if positive else 0.5)
    entropy = trainer._metrics["train"]["entropy"][-1]
    trainer._kept = lambda batch, log=False: None
    with scored_rows(trainer) as counts:
        expected = loss_and_gradients(trainer, batch)
    assert set(counts) == {8}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(float(g.abs().max()) for g in expected[1:]) > 1e-3
    assert entropy != 0 and entropy == pytest.approx(trainer._metrics["train"]["entropy"][-1], rel=0.5)


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_losses_with_other_terms_score_all_rows(make_trainer: Any, case: Any) -> None:
    trainer = build(make_trainer, case)
    batch = worn_batch(trainer)
    with scored_rows(trainer) as counts:
        loss_and_gradients(trainer, batch)
    assert set(counts) == {8}
    assert "diffusion/rows_scored_share" not in trainer._metrics["train"]


def test_a_loss_of_one_s_own_scores_all_rows_unless_it_says_otherwise(make_trainer: Any) -> None:
    class Own(DiffuGRPOTrainer):
        def loss(self, scores: Any, batch: dict[str, Any]) -> Tensor:
            return -scores.log_probs.mean()

    class Declared(Own):
        def rows_that_count(self, batch: dict[str, Any]) -> Tensor:
            return batch["advantages"] > 0

    for kind, expected in ((Own, 8), (Declared, 2)):
        trainer = make_trainer(trainer=kind, beta=0.0, max_steps=1)
        batch = worn_batch(trainer)
        with scored_rows(trainer) as counts:
            loss_and_gradients(trainer, batch)
        assert counts == [expected]


def test_a_batch_without_any_advantage_scores_one_row_and_moves_nothing(make_trainer: Any) -> None:
    trainer = build(make_trainer, LINEAR["coupled-grpo"], num_iterations=2, max_steps=2, rewards=always)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with scored_rows(trainer) as counts:
        trainer.train()
    assert set(counts) == {1}
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


def always(completions: list[str], **columns: Any) -> list[float]:
    return [0.3] * len(completions)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_give_no_advantage_whatever_rounding_makes_of_their_mean(make_trainer: Any, scale: str) -> None:
    """The mean of six times 0.3 is not 0.3 in float32, and a deviation near zero makes a thousandth of it."""
    trainer = make_trainer(
        trainer=DiffuGRPOTrainer, rewards=always, num_generations=6, per_device_train_batch_size=6, max_steps=1,
        beta=0.0, scale_rewards=scale,
    )  # fmt: skip
    trainer.train()
    assert not trainer._buffered_inputs[0]["advantages"].any()


# --- the old policy ---------------------------------------------------------------------------------------------------


@contextmanager
def old_scores(trainer: Any) -> Iterator[list[int]]:
    """Iterations whose views are scored without gradients."""
    iterations: list[int] = []
    score = trainer._score

    def counting(model: Any, rows: Any, iteration: int, *rest: Any, **more: Any) -> Any:
        iterations.append(iteration)
        return score(model, rows, iteration, *rest, **more)

    trainer._score = counting
    try:
        yield iterations
    finally:
        del trainer._score


def weights_after(trainer: Any) -> tuple[list[Tensor], list[float], list[int]]:
    with old_scores(trainer) as iterations:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [p.detach().clone() for p in trainer.model.parameters()], losses, iterations


OLD: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any], list[int]]] = {
    # Passes 1 and 2 have views of their own, that of pass 0 are scored in the loss.
    "fresh": (("DiffuGRPOTrainer", {"p_mask_prompt": 0.5}), {"num_iterations": 3}, [1, 2]),
    # One view for all passes: the first loss's scores are the old ones of all.
    "same-views": (("DiffuGRPOTrainer", {"p_mask_prompt": 0.0}), {"num_iterations": 3}, []),
    "per-view": (("BGPOTrainer", {"num_views": 2}), {"num_iterations": 2}, [1]),
    "sequence": (("ESPOTrainer", {"beta": 0.0}), {"num_iterations": 2}, [1]),
    "re-entrant": (LINEAR["re-entrant"], {"num_iterations": 2}, [1]),
    "old-kl": (
        ("DiffuGRPOTrainer", {"beta": 0.04, "kl_target": "old", "kl_estimator": "k1", "use_bias_correction_kl": True}),
        {"num_iterations": 2},
        [1],
    ),
    # An optimizer step takes two passes: both are of the policy that made the batch.
    "two-passes-a-step": (
        ("DiffuGRPOTrainer", {"p_mask_prompt": 0.5}),
        {"num_iterations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        [2, 3],
    ),
    # A pass takes two optimizer steps: the second one's micro-batches meet another policy.
    "two-steps-a-pass": (
        ("DiffuGRPOTrainer", {"p_mask_prompt": 0.5}),
        {"num_iterations": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2,
         "per_device_train_batch_size": 4},
        [0, 1],
    ),
    # Generation falls into the middle of a step every other time.
    "not-aligned": (
        ("DiffuGRPOTrainer", {"p_mask_prompt": 0.5}),
        {"num_iterations": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        [0, 1, 2] * 2,
    ),
    "entropies-first": (("IGPOTrainer", {**HINTS, **NO_KL}), {"num_iterations": 2}, [0]),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_first_passes_are_their_own_old_policy(make_trainer: Any, name: str) -> None:
    case, settings, expected = OLD[name]
    beta = {} if "beta" in case[1] or case[0] == "BGPOTrainer" else NO_KL
    changes = {"max_steps": 3, **beta, **settings}
    weights, losses, iterations = weights_after(build(make_trainer, case, **changes))
    assert iterations[: len(expected)] == expected
    other = build(make_trainer, case, **changes)
    other._passes_of_one_policy = lambda: 0
    all_weights, all_losses, all_iterations = weights_after(other)
    assert len(all_iterations) >= len(iterations) and 0 in all_iterations
    assert losses == pytest.approx(all_losses, abs=1e-12)
    for a, b in zip(weights, all_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_advantages_that_may_read_old_scores_find_them(make_trainer: Any) -> None:
    seen: list[Tensor] = []

    class Reading(DiffuGRPOTrainer):
        def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
            seen.append(batch["old_per_token_logps"])
            return None

    trainer = make_trainer(trainer=Reading, beta=0.0, num_iterations=2, max_steps=1)
    trainer.train()
    assert seen[0].shape[:2] == (8, 2) and (seen[0] != 0).any(-1).all()


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_process_without_rows_to_score_stays_in_step(tmp_path: Path, stage: int | None) -> None:
    if stage is not None and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    arguments = [tmp_path / "results.pt"]
    if stage is not None:
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        automatic = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
        )
        arguments.append(tmp_path / "deepspeed.json")
        arguments[-1].write_text(
            json.dumps({**automatic, "zero_allow_untested_optimizer": True, "zero_optimization": zero})
        )
    launch(Path(waste_worker.__file__), tmp_path, *arguments)
    found = torch.load(arguments[0], weights_only=False)["run"]
    alone = waste_worker.run(tmp_path / "alone", 1)
    assert found["world_size"] == 2 and found["share"] == alone["share"] == [0.5, 0.5]
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-5)
