"""The benchmark of a training step: one process per library, a step at a time, and every second in a part."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_step_benchmark", ROOT / "benchmarks" / "training_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.mark.slow
def test_a_step_is_the_sum_of_its_parts_and_goes_into_a_table(benchmark: ModuleType) -> None:
    (found,) = benchmark.in_turns({"after": ROOT}, "float64", 3).values()
    assert len(found["losses"]) == 3 and all(map(math.isfinite, found["losses"]))
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert min(found["parts"][part] for part in ("rollout", "scores and loss", "backward")) > 0
    report = {
        "steps": 1, "before": "abc", "ratios": [2.0], "ratio": 2.0, "largest_difference_of_losses": 0.0,
        "parts": {"before": found["parts"], "after": found["parts"]}, "allocator_as_it_comes": {"ratio": 1.5},
        "machine": {"cpu": "some"}, "command": "python",
    }  # fmt: skip
    text = benchmark.table(report)
    assert all(f"| {part} |" in text for part in found["parts"])


def test_a_process_that_ends_too_early_is_no_measurement(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, BrokenPipeError)):
        benchmark.in_turns({"after": tmp_path}, "float64", 3)
