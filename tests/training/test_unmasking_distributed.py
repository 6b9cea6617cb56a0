"""Unmasking policies in two processes (gloo): as in one, also under ZeRO-2, and when they resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_distributed import needs_deepspeed, train
from tests.training.unmasking_worker import RUNS, run

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

WORKER = Path(__file__).parent / "unmasking_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, pytest.param(2, marks=needs_deepspeed)])
def test_two_processes_equal_one(tmp_path: Path, stage: int | None) -> None:
    two = train(tmp_path, stage, worker=WORKER)
    check_same(two["resumed"], two["both"], 0.0 if stage is None else 1e-7)
    for name, changes in RUNS.items():
        alone = run(tmp_path / f"one {name}", 1, **changes)
        check_same(two[name], alone, 2e-5)
        for theirs, ours in zip(two[name]["log"][:3], alone["log"][:3], strict=True):
            for metric in ("loss", "diffusion/place_log_prob"):
                assert theirs[metric] == pytest.approx(ours[metric], abs=1e-4), metric
        (output,) = (value for weight, value in alone["weights"].items() if "utility.weight" in weight)
        assert float(output.abs().max()) > 1e-3


def check_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=tolerance)
