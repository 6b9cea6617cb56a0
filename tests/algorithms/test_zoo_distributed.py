"""Every algorithm trains in two processes (gloo) as it does in one: whole models and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm.models.tiny import tiny_llada
from tests.algorithms.test_distributed import launch
from tests.algorithms.zoo_worker import ALGORITHMS, run

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("zoo"), worker=Path(__file__).parent / "zoo_worker.py")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_equal_one(two: dict[str, Any], tmp_path: Path, name: str, adapter: bool) -> None:
    found, alone = two[name, adapter], run(name, tmp_path, 1, adapter)
    assert found["rows"] == alone["rows"], "row ids, tokens and advantages"
    assert len({row for row, _, _ in found["rows"]}) == 16
    for theirs, ours in zip(found["log"][:2], alone["log"][:2], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    moved = 0.0
    start = tiny_llada().state_dict() if not adapter else None
    for weight, value in found["weights"].items():
        torch.testing.assert_close(value, alone["weights"][weight], rtol=0, atol=1e-5)
        if start is not None:
            moved = max(moved, float((value - start[weight]).abs().max()))
    assert adapter or moved > 1e-4, "something was learnt"
