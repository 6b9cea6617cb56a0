"""The example of a schedule of one's own runs, and its schedule is what it says."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rl4dlm.rollout.decoding import DecodingConfig, available_schedules
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.schedules import registry
from tests.rollout.denoisers import PROMPTS, denoiser

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module; what it registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("custom_schedule", EXAMPLES / "custom_schedule.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert "spaced" in available_schedules()
    return module


def test_it_measures_its_schedule_beside_low_confidence(example: ModuleType, capsys: pytest.CaptureFixture[str]):
    example.main(["--puzzles", "12", "--distances", "4", "16"])
    lines = capsys.readouterr().out.splitlines()[1:]
    measured = {line[:26].strip(): line[26:].split() for line in lines}
    assert list(measured) == [
        "low_confidence, 4 steps",
        "low_confidence, 8 steps",
        "spaced, 4 apart",
        "spaced, 16 apart",
    ]
    assert [float(measured[name][0]) for name in measured] == [4, 8, pytest.approx(7, abs=3), 16]
    assert all(0 <= float(solved) <= 1 for _, solved, *_ in measured.values())


@pytest.mark.parametrize("distance", [1, 3, 12])
def test_tokens_of_a_step_are_far_enough_apart(example: ModuleType, distance: int):
    arguments = {"distance": distance}
    config = DecodingConfig(canvas_length=12, schedule="spaced", schedule_args=arguments, stop_at_eos=False)
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config)
    for row in rollout.trace.commit_step:
        for step in range(int(row.max()) + 1):
            places = (row == step).nonzero().squeeze(-1).tolist()
            assert places
            assert all(b - a >= distance for a, b in itertools.pairwise(places))
    if distance in (1, 12):
        assert rollout.nfe.tolist() == [distance] * len(PROMPTS)


@pytest.mark.parametrize("distance", [0, 1.5, True])
def test_a_bad_distance_is_refused(example: ModuleType, distance: Any):
    with pytest.raises(ValueError, match="distance"):
        DecodingConfig(schedule="spaced", schedule_args={"distance": distance})
