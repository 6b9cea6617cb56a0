"""The benchmarks of rollouts run, count what formulas say, and give the figures of docs/performance.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, rollout
from benchmarks.counting import Alive, forwards
from benchmarks.positions import FORMULAS, Grid, positions_fed
from rl4dlm.rollout.caches import available_caches

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
SMALL = rollout.Shape("tiny", 64, 2, 24, 32, 8, 2)


# --- what is counted --------------------------------------------------------------------------------------------------


def fed(shape: rollout.Shape, variant: rollout.Variant) -> list[int]:
    """Positions of a row fed at each step."""
    with forwards(rollout.model_of(shape).base_model) as seen:
        rollout.runner(shape, variant)()
    assert all(rows == shape.rows for rows, _ in seen)
    return [columns for _, columns in seen]


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FORMULAS),
    ("prefix", {"refresh_blocks": 3}),
    ("prefix", {"refresh_steps": 2}),
    ("prefix", {"suffix_window": 4}),
    ("dual", {"refresh_blocks": 2}),
    ("dual", {"refresh_steps": 3}),
    ("dual_masked", {"refresh_blocks": 2, "refresh_steps": 3}),
    ("vicinity", {"before": 3, "after": 5, "warmup_steps": 1, "refresh_steps": 3}),
    ("dkv_decode", {"refresh_steps": 3}),
    ("dkv_greedy", {"window": 2, "refresh_steps": 3}),
]


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize(("cache", "arguments"), SETTINGS)
def test_positions_fed_are_those_of_the_formula(cache: str, arguments: dict[str, Any], per_step: int):
    shape = rollout.replace(SMALL, per_step=per_step)
    schedule = "random" if cache == "dkv_greedy" else "low_confidence"
    variant = rollout.Variant(cache, cache, arguments, schedule)
    assert fed(shape, variant) == positions_fed(shape.grid, cache, arguments)


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_positions_fed_of_block_models_too(cache: str, block: int):
    shape = rollout.replace(SMALL, attention="block_causal", block=block, per_step=1)
    assert fed(shape, rollout.Variant(cache, cache)) == positions_fed(shape.grid, cache)


def test_every_policy_is_measured():
    """`sub_block` needs a schedule of its own, and is measured with schedules."""
    assert {variant.cache for variant in rollout.POLICIES} == set(FORMULAS) == set(available_caches()) - {"sub_block"}


def test_dual_feeds_what_the_paper_says():
    grid = Grid(256, 256, 32, 4)
    assert sum(positions_fed(grid, "dual")) / 256 == (512 + 7 * 32) / 32


def test_tensors_are_counted_while_they_are_alive():
    there = torch.zeros(1000)
    with Alive() as alive:
        kept = there + 1  # 4,000 bytes
        kept.view(10, 100).add_(1)
        other = kept * 2
        del other
        kept = kept.double()  # 8,000 more, and then 4,000 less
        torch.zeros(10)
    assert alive.peak == 12_000
    assert alive.now == 8000


# --- the plain loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_step", [1, 4])
def test_the_plain_loop_writes_what_the_engine_writes(per_step: int):
    """At temperature 0 both are LLaDA's sampler."""
    shape = rollout.replace(SMALL, per_step=per_step, spread=0.4, peaked=2.0)
    model = rollout.model_of(shape)
    with torch.no_grad():
        model.lm_head.weight[rollout.MASK] = 0  # the loop may write mask tokens, the engine never does
    greedy = rollout.Variant("none", more={"temperature": 0.0, "steps": shape.grid.steps})
    canvas = rollout.runner(shape, greedy)().canvas
    assert (canvas != rollout.MASK).all() and len(canvas.unique()) > 8
    assert torch.equal(rollout.plain_loop(model, shape, 0.0), canvas)


def test_the_plain_loop_draws_by_seed():
    drawn = [rollout.plain_loop(rollout.model_of(SMALL), SMALL, 0.9, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# --- the commands -----------------------------------------------------------------------------------------------------

PARTS = {
    "ratios": {"claims", "groups"},
    "policies": {"variants", "trained"},
    "schedules": {"groups"},
    "growth": {"curves"},
    "queue": {"claims", "variants"},
    "draw": {"cases"},
}


@pytest.mark.parametrize("suite", list(rollout.SUITES))
def test_a_suite_runs(suite: str, tmp_path: Path):
    rollout.main(["--suite", suite, "--quick", "--rounds", "1", "--output", str(tmp_path)])
    report = json.loads((tmp_path / f"rollout_{suite}.json").read_text())
    assert set(report) >= PARTS[suite] | {"command", "machine", "versions", "rounds"}
    assert report["command"] in (tmp_path / f"rollout_{suite}.md").read_text()
    assert (tmp_path / f"rollout_{suite}.png").exists() == (suite == "growth")
    groups = [report, *report.get("groups", {}).values()]
    variants = [v for group in groups for v in group.get("variants", {}).values() if "positions_fed" in v]
    assert all(v["positions_fed"] == v.get("positions_by_formula", v["positions_fed"]) for v in variants)
    if suite == "policies":
        wanted = {"tokens_per_cpu_second", "forwards", "positions_by_formula", "waits_per_step", "mib_alive"}
        assert all(set(v) >= wanted for label, v in report["variants"].items() if label != rollout.PLAIN)
        assert {"equal_tokens", "solved", "audit"} <= set(report["trained"][0])
    if suite == "ratios":
        counted = [claim for claim in report["claims"] if "equal tokens" in claim["claim"]]
        assert len(counted) == 4 and all(claim["value"] == 1 for claim in counted)


def test_rounds_are_refused():
    with pytest.raises(SystemExit):
        rollout.main(["--rounds", "0"])


@pytest.mark.slow
def test_the_benchmark_of_gpus_runs(tmp_path: Path):
    gpu.main(["--tiny", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["runs"]) == len(gpu.FULL) + len(gpu.BLOCKS)
    assert {run.cache for run in gpu.FULL} == set(FORMULAS)
    for run in report["runs"]:
        assert run["tokens_per_second"] > 0 and run["forwards"] == 64 // run["tokens_per_step"]
    assert report["bfloat16"]["agreement_where_clear"] > 0.99
    assert "| SDAR-8B | auto | 4 |" in (tmp_path / "gpu.md").read_text()


def test_what_there_is_no_time_for_is_named(tmp_path: Path):
    gpu.main(["--tiny", "--seconds", "0", "--output", str(tmp_path)])
    assert all(run["left_out"] for run in json.loads((tmp_path / "gpu.json").read_text())["runs"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main([])


@pytest.mark.parametrize(
    ("cache", "left_to_right", "per_step", "tokens"),
    [
        ("none", False, 1, 108),
        ("none", False, 4, 433),
        ("prefix", False, 4, 1161),
        ("dual", False, 1, 1152),
        ("dual", False, 4, 2380),
        ("dual", True, 1, 1584),
        ("dual", True, 4, 5401),
    ],
)
def test_bounds_are_those_computed_elsewhere(cache: str, left_to_right: bool, per_step: int, tokens: int):
    """Of LLaDA-8B on an H200, 64 rows, 256 and 256 tokens, blocks of 32, in tokens per second."""
    grid = Grid(256, 256, 32, per_step, left_to_right)
    seconds = gpu.bound(gpu.LLADA_8B, grid, cache, {}, 64, 790e12, 4.3e12)
    assert 64 * 256 / seconds == pytest.approx(tokens, rel=0.02)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_figures_of_the_page_are_those_of_the_runs():
    """Every table that follows the name of a results file is made of lines of that file."""
    text, cited = PAGE.read_text(encoding="utf-8"), set()
    for name, table in re.findall(r"`benchmarks/results/([\w.]+\.md)`[^|]*?\n\n((?:\|.*\n)+)", text):
        cited.add(name)
        lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
        assert [line for line in table.splitlines() if line not in lines] == []
    assert cited >= {f"rollout_{name}.md" for name in ("ratios", "policies", "schedules", "queue")}
