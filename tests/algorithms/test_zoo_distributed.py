"""Every algorithm trains in two processes (gloo) as it does in one: whole models, adapters, and views under ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm.models.tiny import tiny_llada
from tests.algorithms.zoo_worker import ONE_VIEW, REST, RUNS, SPLIT_GROUPS, run
from tests.training.test_distributed import needs_deepspeed, train

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


WORKER = Path(__file__).parent / "zoo_worker.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("zoo"), worker=WORKER)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("zoo"), "rest", worker=WORKER)


@pytest.mark.parametrize(("name", "adapter"), RUNS)
def test_two_processes_equal_one(two: dict[Any, Any], tmp_path: Path, name: str, adapter: bool) -> None:
    check_run(two, tmp_path, name, adapter)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapter"), REST)
def test_the_other_of_whole_models_and_adapters(rest: dict[Any, Any], tmp_path: Path, name: str, adapter: bool) -> None:
    check_run(rest, tmp_path, name, adapter)


def check_run(two: dict[Any, Any], tmp_path: Path, name: str, adapter: bool) -> None:
    found, alone = two[name, adapter], run(name, tmp_path, 1, adapter)
    assert found["rows"] == alone["rows"], "row ids, tokens and advantages"
    assert len({row for row, _, _ in found["rows"]}) == 16
    for theirs, ours in zip(found["log"][:2], alone["log"][:2], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    moved = 0.0
    start = tiny_llada().state_dict() if not adapter else None
    for weight, value in found["weights"].items():
        torch.testing.assert_close(value, alone["weights"][weight], rtol=0, atol=1e-5)
        if start is not None and (weight in start or weight.endswith((".output.weight", ".choice.weight"))):
            before = start.get(weight, torch.zeros_like(value))  # a policy's last layer, which starts at 0
            moved = max(moved, float((value - before).abs().max()))
    assert adapter or moved > 1e-4, "something was learnt"


@pytest.mark.parametrize("name", SPLIT_GROUPS)
def test_weights_of_a_group_that_is_split(two: dict[Any, Any], tmp_path: Path, name: str) -> None:
    alone = run(name, tmp_path, 1, False, num_generations=16, **SPLIT_GROUPS[name])
    check_same(two["groups", name], alone)
    shares = [run["log"][1]["diffusion/effective_sample_share"] for run in (two["groups", name], alone)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-5) and shares[0] < 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[str, Any]]:
    """Runs that score one view after another, in this process; adapters without checkpoints in their layers."""
    plain = {"activation_checkpointing": False, "one_view": True}
    return {
        (name, adapter): run(name, tmp_path_factory.mktemp("alone"), 1, adapter, **plain, **ONE_VIEW[name])
        for name in ONE_VIEW
        for adapter in (False, True)
    }


@pytest.mark.parametrize("name", ONE_VIEW)
def test_views_one_after_another_in_two_processes(two: dict[Any, Any], alone: dict[Any, Any], name: str) -> None:
    check_same(two["one view", name], alone[name, True])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_views_one_after_another_under_zero_equal_one_process(
    alone: dict[Any, Any], tmp_path: Path, stage: int
) -> None:
    for key, found in train(tmp_path, stage, worker=WORKER).items():
        check_same(found, alone[key])


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rows, losses and weights of two runs; weights have moved."""
    assert found["rows"] == expected["rows"], "row ids, tokens and advantages"
    for theirs, ours in zip(found["log"][:2], expected["log"][:2], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    assert found["weights"].keys() == expected["weights"].keys()
    start = tiny_llada().state_dict()
    for weight, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][weight], rtol=0, atol=1e-5)
    moved = [(value - start[w]).abs().max() for w, value in found["weights"].items() if w in start]
    moved += [value.abs().max() for w, value in found["weights"].items() if "lora_B" in w]  # which start at zero
    assert max(moved) > 1e-4
