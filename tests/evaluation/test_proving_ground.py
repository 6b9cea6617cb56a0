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
from benchmarks.proving_ground.report import table
from benchmarks.proving_ground.results import Results
from benchmarks.proving_ground.settings import EVERY_LINE, LINES, TASKS, VARIANTS, Run, Scale
from benchmarks.proving_ground.unmasking import above_front, best_fixed, front
from rl4dlm import save_denoiser, tiny_llada, tiny_tokenizer

SMALL = Scale(
    batches=2, completions=8, test=4, validation=4, curve=2, prompts=2, samples=2, drifted=4, bounds=2
)  # fmt: skip


def config_of(run: Run) -> Any:
    name = EVERY_LINE[run.algorithm].trainer
    if name == "DiffusionSFTTrainer":
        return rl4dlm.DiffusionSFTConfig
    return getattr(rl4dlm, name.replace("Positives", "BGPO")).config_class


@pytest.mark.parametrize("task", TASKS)
def test_every_line_and_variation_has_settings_that_are_allowed(task: str, tmp_path: Path) -> None:
    for name in [*EVERY_LINE, *VARIANTS] if task == "arithmetic_steps" else EVERY_LINE:
        run = Run(task, "full", name)
        made = config_of(run)(output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=64, **run.settings())
        if run.algorithm == "self_distillation":
            assert made.denoising_steps == run.ground.canvas
        elif run.algorithm not in ("sft", "justgrpo"):
            assert made.denoising_steps in (None, run.ground.canvas // 4, run.ground.canvas // 2)


def test_every_algorithm_has_a_line() -> None:
    bases = {
        "DiffusionPolicyTrainer",
        "TrajectoryTrainer",
        "ELBOKTOTrainer",
        "VRPOTrainer",
    }  # the last two: preferences
    trainers = {name for name in rl4dlm.__all__ if name.endswith("Trainer")} - bases
    assert trainers == {line.trainer for line in EVERY_LINE.values()} - {"PositivesTrainer"}


def test_variations_differ_from_their_algorithm() -> None:
    """On some task: what varies on one may be a setting that another task has anyway."""
    for name, (algorithm, _) in VARIANTS.items():
        assert any(Run(t, "full", name).settings() != Run(t, "full", algorithm).settings() for t in TASKS), name


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


def test_a_learned_order_is_measured_beside_the_confident_one(ground: Path) -> None:
    from benchmarks.proving_ground.report import Results, answers

    run = Run("arithmetic_steps", "full", "lladou+policy_alone", scale=SMALL)
    assert runs.make(run, ground, ground / "logs") == "made"
    measured = json.loads(run.path(ground).read_text())["measured"]
    assert set(measured["learned"]) == {"1", "2", "4", "8"}
    assert set(measured["solved"]) == {*measured["learned"], "threshold"}
    for speed, found in measured["learned"].items():
        assert found["tokens_per_forward"] == pytest.approx(float(speed), rel=0.5)
    before = json.loads((ground / "arithmetic_steps" / "full" / "before.json").read_text())["measured"]
    assert before["solved"] == measured["solved"] and "learned" not in before  # the model itself has not changed
    assert "| LLaDOU, policy alone | learned |" in answers("order", Results(ground))


def test_sft_goes_on_for_as_many_positions_as_are_allowed(ground: Path) -> None:
    run = Run("arithmetic_steps", "full", "sft", scale=SMALL)
    assert runs.make(run, ground, ground / "logs") == "made"
    found = json.loads(run.path(ground).read_text())
    step = found["positions"]["with_gradient"] / found["steps"]
    assert found["positions_allowed"] <= sum(found["positions"].values()) < found["positions_allowed"] + 1.5 * step


def test_what_fails_is_logged_and_the_rest_goes_on(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.EVERY_LINE, "broken", settings.Line("broken", "NoTrainer"))
    said = runs.make(Run("arithmetic_steps", "full", "broken", scale=SMALL), ground, ground / "logs")
    assert said.startswith("failed, see ")
    assert "NoTrainer" in Path(said.removeprefix("failed, see ")).read_text()


def test_the_first_seed_of_everything_comes_first() -> None:
    from argparse import Namespace

    from benchmarks.algorithms import chosen

    options = Namespace(tasks=list(TASKS), models=["full", "block"], algorithms=None, variants=None)
    found = chosen(Namespace(**vars(options), budget="completions", seeds=[0, 1]))
    # The puzzles have one model, and two algorithms are not for models of blocks.
    assert len(found) == len(set(found)) == 2 * (len(LINES) * 5 - 4)
    assert [run.seed for run in found] == sorted(run.seed for run in found)
    options.variants = ["views"]
    assert len(chosen(Namespace(**vars(options), budget="positions", seeds=[0]))) == 5 * len(
        settings.QUESTIONS["views"]
    )


def test_pass_at_k_is_unbiased() -> None:
    from benchmarks.proving_ground.statistics import pass_at

    right = [1, 2, 0, 1]  # of four prompts and three completions each
    assert pass_at(right, 1) == pytest.approx((2 * 1 / 3 + 1) / 4)
    assert pass_at(right, 2) == pytest.approx((2 * (1 - comb(2, 2) / comb(3, 2)) + 1) / 4)
    assert pass_at(right, 3) == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="k=4"):
        pass_at(right, 4)


# --- what is shown ----------------------------------------------------------------------------------------------------


def made_up(folder: Path) -> Path:
    """Results of two seeds of one algorithm and of a run that came to nothing."""
    scale = {"samples": 2}
    task = {"task": "arithmetic_steps", "model": "full"}

    def measured(four: float, right: list[int]) -> dict[str, Any]:
        rates = {"1": 0.9, "2": 0.8, "4": four, "8": 0.1, "threshold": 0.7}
        return {
            "rows": 100,
            "solved": {speed: {"solved": rate, "tokens_per_forward": 2.0} for speed, rate in rates.items()},
            "area": 0.5,
            "drawn": {"right": right, "length": 10.0, "ended": 1.0, "empty": 0.0},
            "drift": [0.25, 0.1],
        }

    files: dict[str, dict[str, Any]] = {"before": {"validation": 0.4, "measured": measured(0.4, [2, 1, 1])}}
    for seed, four in enumerate((0.5, 0.54)):
        files[f"espo-completions-{seed}"] = {
            **{"algorithm": "espo", "budget": "completions", "seed": seed, "completions": 64},
            **{"positions": {"without_gradient": 1_000_000, "with_gradient": 500_000}, "cpu_seconds": 60.0},
            **{"learning_curve": {"used": [0.5, 1.0], "solved": [0.45, 0.5]}, "measured": measured(four, [1, 1, 2])},
        }
    files["dmpo-completions-0"] = {"budget": "completions", "seed": 0, "given_up": "step 3 was skipped"}
    for name, entries in files.items():
        path = folder / "arithmetic_steps" / "full" / f"{name}.json"
        runs.write(path, {**task, "name": name.partition("-")[0], "scale": scale, **entries})
    return folder


def test_the_report_shows_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    from benchmarks.proving_ground.report import report

    folder, page, figure = made_up(tmp_path / "results"), tmp_path / "page.md", tmp_path / "figure.png"
    page.write_text("a\n<!-- results: overview -->\nold\n<!-- end -->\nb\n")
    report(folder, page, figure)
    text = (tmp_path / "results.md").read_text()
    rates = "0.900 ± 0.000 | 0.800 ± 0.000 | 0.520 ± 0.254 | 0.100 ± 0.000 | 0.700 ± 0.000"
    assert f"| ESPO | +12.0 ± 25.4, +10.0 to +14.0 | {rates} | 2.00 ± 0.00 | 0.500 ± 0.000 |" in text
    drawn = "0.625 ± 0.000 | 0.750 ± 0.000 | 10.0 | 1.000 | 0.000 | +0.25 ± 0.00"
    assert f"| ESPO | {drawn} | 64 | 1.50 | 60 |" in text
    assert "| start |  | 0.900 [0.826, 0.945] |" in text
    assert "| start | 0.375 ± 0.406 | 0.500 ± 0.490 | 10.0 |" in text
    assert "1 of 3 seeds of ESPO." in text
    assert "Given up in arithmetic_steps, full, completions: dmpo, seed 0: step 3 was skipped" in text
    assert "| ESPO | +12.0 ± 25.4 |" in page.read_text()
    assert "| wd1 | – |" in page.read_text()
    assert page.read_text().startswith("a\n") and "old" not in page.read_text()
    assert figure.is_file() and (tmp_path / "results.png").is_file()


def test_the_page_shows_the_results_that_are_there() -> None:
    from benchmarks.proving_ground.report import PAGE, everything, filled

    results = Results()
    assert filled(PAGE.read_text(), results) == PAGE.read_text(), "run python benchmarks/algorithms.py --report"
    if results.runs:
        assert settings.RESULTS.with_suffix(".md").read_text() == everything(results)


def test_the_page_has_the_orders_that_nobody_has_learnt() -> None:
    from benchmarks.fixed_orders import ORDERS, RESULT
    from benchmarks.proving_ground.report import PAGE

    found = json.loads(RESULT.read_text())["few_clue_sudoku"]
    assert tuple(found) == ORDERS
    for order, rates in found.items():
        assert f"| `{order}` | {' | '.join(f'{rate:.3f}' for rate in rates.values())} |" in PAGE.read_text()
    before = json.loads((settings.RESULTS / "few_clue_sudoku" / "full" / "before.json").read_text())["measured"]
    for speed, rate in found["low_confidence"].items():
        assert rate == pytest.approx(before["solved"][speed]["solved"], abs=1e-4)


def test_the_page_has_the_blocks_that_nobody_has_learnt() -> None:
    from benchmarks.fixed_orders import RESULT
    from benchmarks.proving_ground.report import PAGE

    found = json.loads(RESULT.read_text())["countdown_small, blocks"]
    for name in ("0.9 sure in blocks of 16", "0.8 sure in blocks of 32"):
        forwards, rate = found[name]
        words = f"{rate:.3f} with {forwards:.2f}"
        assert words in " ".join(PAGE.read_text().split()), words
    before = json.loads((settings.RESULTS / "countdown_small" / "full" / "before.json").read_text())["measured"]
    assert found["0.9 sure in blocks of 8"][1] == pytest.approx(before["solved"]["threshold"]["solved"], abs=1e-4)


def test_results_are_small() -> None:
    assert all(path.stat().st_size < 6000 for path in settings.RESULTS.glob("*/*/*.json"))


def test_every_trainer_has_its_cost_on_the_page() -> None:
    """In positions of the files, beside diffu-GRPO's."""
    from benchmarks.proving_ground.report import Results, cost

    results = Results()
    runs = results.runs["few_clue_sudoku", "full", "completions"]
    lines = dict(line.split(" | ", 1) for line in cost(results).replace("| ", "", 1).split("\n| ") if "---" not in line)
    assert set(lines) - {"positions for a completion"} == {line.title for line in settings.ALGORITHMS.values()}
    first, other = runs["diffu_grpo"], runs["cj_grpo"]

    def each(found: Any) -> float:
        return sum(r["positions"]["with_gradient"] / r["steps"] / 64 for r in found) / len(found)

    assert lines["CJ-GRPO"].split(" | ")[1:3] == [f"{each(other):.1f}", f"{each(other) / each(first):.1f}"]
    assert lines["diffu-GRPO"].split(" | ")[2] == "1.0"


def test_what_the_page_says_of_speed_and_of_values() -> None:
    """Runs that are paid for speed are faster and less often right than the unpaid one of their seed."""
    from benchmarks.proving_ground.report import PAGE, UNPAID, Results, interval
    from benchmarks.proving_ground.statistics import student_half

    results, group = Results(), ("few_clue_sudoku", "full", "completions")
    runs = results.runs[group]
    quick = {
        name: {found["seed"]: found["measured"]["solved"]["threshold"] for found in runs[name]}
        for name in ("lightningrl", "lightningrl+published_sum", UNPAID)
    }
    for name in ("lightningrl", "lightningrl+published_sum"):
        assert set(quick[name]) >= {0, 1, 2}
        for seed in (0, 1, 2):
            mine, theirs = quick[name][seed], quick[UNPAID][seed]
            assert mine["tokens_per_forward"] > theirs["tokens_per_forward"] and mine["solved"] < theirs["solved"]
    page = " ".join(PAGE.read_text().split())
    without = results.gains(group, "tracerl")
    for name in settings.QUESTIONS["values"]:
        apart = [a - b for a, b in zip(results.gains(group, name), without, strict=True)]
        assert interval(apart) in page and len(apart) >= 3
        assert abs(sum(apart)) / len(apart) < student_half(apart), "the interval holds 0"


def test_the_front_of_fixed_schedules_is_concave_and_between_them_lie_mixtures() -> None:
    fixed = [(16.0, 0.9), (4.0, 0.5), (8.0, 0.6), (8.0, 0.8), (2.0, 0.1), (12.0, 0.7), (20.0, 0.9)]
    assert front(fixed) == [(2.0, 0.1), (4.0, 0.5), (8.0, 0.8), (16.0, 0.9)]
    assert front([(2.0, 0.0), (4.0, 0.1), (8.0, 0.8)]) == [(2.0, 0.0), (8.0, 0.8)], (
        "what lies below a mixture is left out"
    )
    assert best_fixed(fixed, 6.0) == pytest.approx(0.65) and best_fixed(fixed, 30.0) == 0.9
    assert best_fixed(fixed, 1.5) is None
    measured = {"policy": {"greedy": [6.0, 0.7], "drawn": [1.0, 0.9]}, "fixed": {str(p): list(p) for p in fixed}}
    assert above_front(measured, "greedy") == pytest.approx(5.0) and above_front(measured, "drawn") is None


@pytest.mark.parametrize("name", ["bernoulli_unmasking", pytest.param("ctrldiff", marks=pytest.mark.slow)])
def test_policies_are_measured_beside_fixed_schedules(name: str, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SPEEDS", (4, 8))
    small = replace(settings.UNMASKING[name], settings={**settings.UNMASKING[name].settings, "policy_hidden_size": 8})
    monkeypatch.setitem(settings.EVERY_LINE, name, small)
    run = Run("arithmetic_steps", "full", name, scale=replace(SMALL, completions=16))
    assert runs.make(run, ground, ground / "logs") == "made"
    found = json.loads(run.path(ground).read_text())
    assert set(found["points"]["policy"]) == {"greedy", "drawn"} and len(found["points"]["fixed"]) > 8
    assert all(forwards >= 1 and 0 <= solved <= 1 for forwards, solved in found["points"]["policy"].values())
    assert found["positions"]["with_gradient"] == 0 < found["positions"]["without_gradient"]
    results = Results(ground)
    assert "Best fixed schedules:" in table("question/unmasking", results)
