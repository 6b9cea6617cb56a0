"""The benchmark of estimators: what it takes for exact is, and every estimator is measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rl4dlm.likelihood.estimator import Estimator
from tests.likelihood.test_estimators import ESTIMATORS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "estimators.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimators_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_every_estimator_is_measured_once(benchmark: ModuleType) -> None:
    measured = [entry.estimator for entry in benchmark.ENTRIES]
    assert {type(e) for e in measured} == {type(e) for e in ESTIMATORS} and len(set(measured)) == len(measured)
    assert all(isinstance(e, Estimator) and e.noise == "mask" for e in measured)


@pytest.mark.parametrize("decoding", ["one step", "left to right", "random order", "blocks"])
def test_the_exact_policy_gradient_is_that_of_the_expected_reward(benchmark: ModuleType, decoding: str) -> None:
    model = benchmark.Denoiser(1, 1.0)
    p, advantage, slopes = model.policy(decoding)
    gradient = torch.einsum("y,yw->w", p * advantage, slopes).view_as(model.weight)
    direction = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction *= model.uses
    values = []
    for step in (-1e-5, 1e-5):
        moved = benchmark.Denoiser(1, 1.0, change=step * direction)
        values.append(float((moved.likelihood(decoding).exp() * moved.reward).sum()))
    assert (values[1] - values[0]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_bounds_are_below_and_exact_estimators_are_exact(benchmark: ModuleType) -> None:
    model = benchmark.Denoiser(0, 1.0)
    assert (model.target("any-order bound") < model.likelihood("random order")).all()
    assert (model.target("block bound") < model.likelihood("blocks")).all()
    for entry in benchmark.ENTRIES[:2]:
        found = benchmark.measure(entry, model, 4, seed=0)
        assert found["variance"] == found["gradient_noise"] == 0
        assert found["bias"] == pytest.approx(0, abs=1e-12) and found["gradient_bias"] == pytest.approx(0, abs=1e-12)


def test_estimates_are_as_far_from_their_targets_as_chance_explains(benchmark: ModuleType) -> None:
    model = benchmark.Denoiser(0, 1.0)
    for entry in benchmark.ENTRIES:
        name = f"{entry.name}, {entry.settings}"
        exempt = entry.estimator.reweighted or "quadrature" in name or "2 tokens per view" in name
        if not exempt and entry.estimator.draw(benchmark.rows(1), seed=0, iteration=0).hidden.shape[1] <= 2:
            found = benchmark.measure(entry, model, 200, seed=0)
            assert abs(found["bias"]) < 5 * found["bias_error"] + 1e-9, name


def test_the_noise_of_a_group_is_that_of_its_members_together(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For groups of two: the variance over draws of the mean of A grad S, of all pairs of completions one by one."""
    model, group = benchmark.Denoiser(0, 1.0), 2
    monkeypatch.setattr(benchmark, "GROUP", group)
    for entry in benchmark.SHARED[1:3]:
        found = benchmark.measure_group(entry, model, 12, seed=0)
        assert entry.estimator.shares_masks
        together = spread = 0.0
        for p, advantage, exact, drawn in benchmark._of_prompts(entry, model, 12, seed=0):
            weighted = advantage[:, None, None] * torch.stack(drawn)  # [Y, N, W]
            for y in range(len(p)):
                pairs = (weighted[y] + weighted) / group
                together += float((p[y] * p * pairs.var(1).sum(-1)).sum())
            of_one = advantage[:, None] * exact
            spread += float((p * (of_one - p @ of_one).square().sum(-1)).sum()) / group
        assert found["noise_by_prompt"] == pytest.approx(together / spread, rel=1e-9)


def test_it_writes_what_it_measures(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "ENTRIES", benchmark.ENTRIES[:4])
    monkeypatch.setattr(benchmark, "SHARED", benchmark.SHARED[:1])
    monkeypatch.setattr(sys, "argv", ["estimators.py", "--draws", "20", "--models", "1", "--output", str(tmp_path)])
    benchmark.main()
    report = json.loads((tmp_path / "estimators.json").read_text())
    assert [r["estimator"] for r in report["results"]] == [e.name for e in benchmark.ENTRIES]
    assert (tmp_path / "estimators.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "estimators.png").stat().st_size > 1000
