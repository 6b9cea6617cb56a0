"""Preferences in two processes (gloo), whole and under ZeRO-2 and ZeRO-3, as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.algorithms import preferences_worker
from tests.algorithms.preferences_worker import TRAINERS, run
from tests.training.test_distributed import needs_deepspeed, train

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

SAME = {
    "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy",
    "elbo_kto/baseline",
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return {(name, lora): run(name, folder / f"{name}-{lora}", 1, lora) for name in TRAINERS for lora in (False, True)}


@pytest.mark.parametrize(
    "stage", [None, pytest.param(2, marks=needs_deepspeed), pytest.param(3, marks=needs_deepspeed)]
)
def test_two_processes_equal_one(alone: dict[Any, Any], tmp_path: Path, stage: int | None) -> None:
    """z0, too, is that of both: where one has what is wanted, and the other what is not."""
    for key, found in train(tmp_path, stage, worker=Path(preferences_worker.__file__)).items():
        expected = alone[key]
        assert len(found["log"]) == len(expected["log"])
        for theirs, ours in zip(found["log"], expected["log"], strict=True):
            for name in SAME & ours.keys():
                if name in theirs or name != "logps/chosen":
                    assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=2e-5), (key, name)
        assert found["weights"].keys() == expected["weights"].keys()
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=1e-5)
    assert abs(alone["ELBOKTO", False]["log"][1]["elbo_kto/baseline"]) > 1e-5
