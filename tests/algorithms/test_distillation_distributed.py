"""Every kind of teacher in two processes (gloo), whole and under ZeRO-2 and ZeRO-3, as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm.models.tiny import tiny_llada
from tests.algorithms import distillation_worker
from tests.algorithms.distillation_worker import KINDS, run
from tests.training.test_distributed import needs_deepspeed, train

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return {kind: run(kind, folder / kind, 1) for kind in KINDS}


@pytest.mark.parametrize(
    "stage", [None, pytest.param(2, marks=needs_deepspeed), pytest.param(3, marks=needs_deepspeed)]
)
def test_teachers_of_two_processes_are_those_of_one(alone: dict[str, Any], tmp_path: Path, stage: int | None) -> None:
    start = tiny_llada().state_dict()
    for kind, found in train(tmp_path, stage, worker=Path(distillation_worker.__file__)).items():
        expected = alone[kind]
        for theirs, ours in zip(found["log"][:2], expected["log"][:2], strict=True):
            for name in ("loss", "grad_norm", "distillation/nll", "distillation/divergence"):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), (kind, name)
        assert found["weights"].keys() == expected["weights"].keys(), kind
        moved = 0.0
        for name, value in found["weights"].items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=1e-5)
            before = start.get(name, 0 if "lora_B" in name else value)
            moved = max(moved, float((value - before).abs().max()))
        assert moved > 1e-4, f"{kind}: something was learnt"
