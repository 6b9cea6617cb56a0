"""The benchmark of schedules measures all of them, with settings that can be run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rl4dlm.rollout.schedules import registry
from tests.rollout.schedules.examples import token_filter

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "schedules.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds the folder of examples
    spec = importlib.util.spec_from_file_location("schedules_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_schedule_is_measured_with_settings_that_exist(benchmark: ModuleType):
    settings = [setting for group in benchmark.GROUPS.values() for setting in group]
    ours = {name for name in registry.names() if registry.lookup(name).build.__module__.startswith("rl4dlm.")}
    assert {setting.schedule for setting in settings} == ours - set(benchmark.FOR_OTHERS)
    files = {"causal": "a folder", "filter": token_filter(benchmark.CELLS)}
    for setting in settings:
        assert setting.config(files).schedule == setting.schedule
    named = [(setting.schedule, setting.label) for setting in settings]
    assert len(named) == len(set(named)), "results are told apart by these"


def test_what_was_measured_is_not_measured_again(benchmark: ModuleType, tmp_path: Path):
    path = tmp_path / "measurements.jsonl"
    benchmark.Record(path).put([["weights"], "threshold", "threshold 0.9", 10, 0], {"solve_rate": 0.5})
    again = benchmark.Record(path)
    assert again.get([["weights"], "threshold", "threshold 0.9", 10, 0]) == {"solve_rate": 0.5}
    assert again.get([["other weights"], "threshold", "threshold 0.9", 10, 0]) is None
