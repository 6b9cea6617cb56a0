"""What every trainer of recorded steps must bear: kills, adapters, one view at a time, uneven rows, inexact caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import rl4dlm
from tests.algorithms.zoo_worker import letters, right
from tests.training.steps import recording, tiny_llada_that_ends
from tests.training.test_resume import Kill

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

THRESHOLD: dict[str, Any] = {
    "schedule": "threshold", "denoising_steps": None, "schedule_args": {"threshold": 0.03},
}  # fmt: skip
TRAJECTORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cj-grpo": ("CJGRPOTrainer", {"beta": 0.04}),
    "tracerl": ("TraceRLTrainer", {}),
    "tracerl-values": (
        "TraceRLTrainer",
        {"value_model": "steps", "value_learning_rate": 0.05, "value_target": "advantage"},
    ),
    "dipo": ("DiPOTrainer", {}),
    "agrpo": ("AGRPOTrainer", {"num_scored_steps": 2, "step_proposal": "entropy"}),
    "d2": ("D2Trainer", {"num_scored_steps": 2}),
    "egspo": ("EGSPOTrainer", {"num_scored_steps": 2}),
    "egspo-sa": ("EGSPOTrainer", {"num_scored_steps": 2, "step_lambda": 0.5, "steps": "entropy_threshold"}),
    "tree-rpo": ("TreeRPOTrainer", {"branches": [2, 2], "cuts": [1], "distillation": 0.1, "distillation_steps": 3}),
    "mdpo": ("MDPOTrainer", {"num_trained_steps": 2, "temperature": 1.0, "score_temperature": 1.0}),
    "wd1++": ("WD1Trainer", {"num_predicted_steps": 2}),
}  # fmt: skip
"""Trainers that learn from recorded states."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stabledrl": ("StableDRLTrainer", {"block_length": 4}),
    "gdsd": ("GDSDTrainer", {"num_views": 2, "beta": 0.04}),
    "ebpo": ("EBPOTrainer", {"num_views": 2, "beta": 0.04}),
    "lightningrl": (
        "LightningRLTrainer", {"min_speed_range": 0.0, "speed_reward": "letters", "rewards": [right, letters]},
    ),
}  # fmt: skip
"""Those of the same issue that score finished completions."""

SLOW = ("tracerl-values", "d2", "egspo", *OTHERS)
"""Those with a sibling among the others, or with a test of their own elsewhere."""


def run(build_trainer: Any, folder: Path, case: tuple[str, dict[str, Any]], **changes: Any) -> Any:
    """Three optimizer steps of an adapter on rollouts of uneven numbers of steps, each batch used twice."""
    trainer = getattr(rl4dlm, case[0])
    common = {
        **THRESHOLD, "max_steps": 3, "num_iterations": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
        "one_view": True, "trainer": recording(trainer), "config": trainer.config_class,
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    }  # fmt: skip
    return build_trainer(folder, tiny_llada_that_ends(), **{**common, **case[1], **changes})


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in (TRAJECTORIES | OTHERS).items()
    ],
)
def test_a_killed_run_goes_on_and_views_may_be_scored_at_once(
    build_trainer: Any, losses: Any, tmp_path: Path, case: Any
) -> None:
    """Bit for bit, from a checkpoint in the middle of a batch; and as with all views at once, but for rounding."""
    whole = run(build_trainer, tmp_path / "whole", case)
    whole.train()
    steps = whole.seen[0]["commit_step"].amax(-1)
    assert len(steps.unique()) > 1 and max(map(abs, losses(whole))) > 1e-4

    kept = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(build_trainer, tmp_path / "killed", case, callbacks=[Kill(1)], **kept).train()
    again = run(build_trainer, tmp_path / "killed", case, **kept)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    found, expected = weights(again), weights(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    if case in OTHERS.values():
        return  # whose estimators have this in `tests/likelihood/test_one_view.py`
    together = run(build_trainer, tmp_path / "together", case, one_view=False, max_steps=1)
    together.train()
    for name in ("loss", "grad_norm"):
        assert together.state.log_history[0][name] == pytest.approx(
            whole.state.log_history[0][name], rel=1e-3, abs=1e-5
        )


CACHE = {"cache": "dual", "block_length": 4, "num_iterations": 1, "max_steps": 1, **THRESHOLD}


@pytest.mark.parametrize("case", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_inexact_caches_need_an_old_policy_that_was_recorded(build_trainer: Any, tmp_path: Path, case: Any) -> None:
    with pytest.raises(ValueError, match="cache='dual'"):
        run(build_trainer, tmp_path / "refused", case, **CACHE)
    recorded: dict[str, Any] = {"old_policy": "recorded", "temperature": 1.0, "beta": 0.0}
    if case[0] in ("MDPOTrainer", "WD1Trainer") or "value_model" in case[1] or "step_lambda" in case[1]:
        return  # predictions are recorded without a cache, and values of the old policy are rescored
    if case[0] in ("D2Trainer", "TreeRPOTrainer"):
        with pytest.raises(ValueError, match="old_policy='recorded' is not allowed"):
            run(build_trainer, tmp_path / "merged", case, **CACHE, **recorded)
        return
    made = run(build_trainer, tmp_path / "recorded", case, **CACHE, **recorded)
    made.train()
    assert made.state.log_history[0]["grad_norm"] > 0
