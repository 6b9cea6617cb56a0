"""The proving ground: settings that are allowed, one run from end to end, files that are made once."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import pytest

import rl4dlm
from benchmarks.proving_ground import run as runs, settings
from benchmarks.proving_ground.settings import LINES, TASKS, VARIANTS, Run, Scale
from rl4dlm import save_denoiser, tiny_llada, tiny_tokenizer

SMALL = Scale(
    batches=2, completions=8, test=4, validation=4, curve=2, prompts=2, samples=2, drifted=4, bounds=2
)  # fmt: skip


def config_of(run: Run) -> Any:
    name = LINES[run.algorithm].trainer
    if name == "DiffusionSFTTrainer":
        return rl4dlm.DiffusionSFTConfig
    return getattr(rl4dlm, name.replace("Positives", "BGPO")).config_class


@pytest.mark.parametrize("task", TASKS)
def test_every_line_and_variation_has_settings_that_are_allowed(task: str, tmp_path: Path) -> None:
    for name in [*LINES, *VARIANTS] if task == "arithmetic_steps" else LINES:
        run = Run(task, "full", name)
        made = config_of(run)(output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=64, **run.settings())
        if run.algorithm not in ("sft", "justgrpo"):
            assert made.denoising_steps in (None, run.ground.canvas // 4, run.ground.canvas // 2)


def test_variations_differ_from_their_algorithm() -> None:
    for name, (algorithm, _) in VARIANTS.items():
        assert Run("arithmetic_steps", "full", name).settings() != Run("arithmetic_steps", "full", algorithm).settings()


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder; the model of every language task is a tiny untrained one."""
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    for name in ("arithmetic_steps", "countdown_small"):
        small = replace(TASKS[name], checkpoints={"full": str(tmp_path / "model")}, canvas=24)
        monkeypatch.setitem(settings.TASKS, name, small)
    return tmp_path / "results"


def test_a_run_leaves_a_file_that_is_made_once(ground: Path) -> None:
    run = Run("arithmetic_steps", "full", "positives", scale=SMALL)
    assert runs.make(run, ground, ground / "logs") == "made"
    assert runs.make(run, ground, ground / "logs") == "there"
    found = json.loads(run.path(ground).read_text())
    assert found["completions"] == 16
    assert found["learning_curve"]["used"] == [0.5, 1.0]
    assert found["positions"]["without_gradient"] > 0
    assert sum(found["measured"]["drawn"]["right"]) == SMALL.prompts
    assert set(found["measured"]["solved"]) == {"1", "2", "4", "8", "threshold"}
    assert run.path(ground).stat().st_size < 6000
    before = json.loads((ground / "arithmetic_steps" / "full" / "before.json").read_text())
    assert before["measured"]["drift"] == [0.0, 0.0]

    other = replace(run, scale=replace(SMALL, batches=3))
    assert runs.make(other, ground, ground / "logs") == "changed"
    assert json.loads(run.path(ground).read_text()) == found


def test_sft_goes_on_for_as_many_positions_as_are_allowed(ground: Path) -> None:
    run = Run("arithmetic_steps", "full", "sft", scale=SMALL)
    assert runs.make(run, ground, ground / "logs") == "made"
    found = json.loads(run.path(ground).read_text())
    step = found["positions"]["with_gradient"] / found["steps"]
    assert found["positions_allowed"] <= sum(found["positions"].values()) < found["positions_allowed"] + 1.5 * step


def test_what_fails_is_logged_and_the_rest_goes_on(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.LINES, "broken", settings.Line("broken", "NoTrainer"))
    said = runs.make(Run("arithmetic_steps", "full", "broken", scale=SMALL), ground, ground / "logs")
    assert said.startswith("failed, see ")
    assert "NoTrainer" in Path(said.removeprefix("failed, see ")).read_text()


def test_area_is_the_mean_accuracy_over_octaves_of_speed() -> None:
    from benchmarks.proving_ground.measuring import area

    assert area({1: 0.5, 2: 0.5, 4: 0.5, 8: 0.5}) == pytest.approx(0.5)
    assert area({1: 1.0, 4: 0.0}) == pytest.approx(0.5)
    assert area({1: 1.0, 2: 0.0, 8: 0.0}) == pytest.approx(0.5 / 3)


def test_pass_at_k_is_unbiased() -> None:
    from benchmarks.proving_ground.measuring import pass_at

    right = [1, 2, 0, 1]  # of four prompts and three completions each
    assert pass_at(right, 1) == pytest.approx((2 * 1 / 3 + 1) / 4)
    assert pass_at(right, 2) == pytest.approx((2 * (1 - comb(2, 2) / comb(3, 2)) + 1) / 4)
    assert pass_at(right, 3) == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="k=4"):
        pass_at(right, 4)
