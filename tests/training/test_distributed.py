"""Two processes on this machine (gloo) train as one does: under DDP, ZeRO-2 and ZeRO-3, and when they resume."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

WORKER = Path(__file__).parent / "worker.py"
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
GATHER = {"stage3_gather_16bit_weights_on_model_save": True}  # or ZeRO-3 does not show its weights
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")


def train(folder: Path, stage: int | str | None = None, worker: Path = WORKER) -> dict[str, Any]:
    """What two processes of a worker find, at a stage of ZeRO, or in the part of its runs that has the name."""
    results = folder / "results.pt"
    arguments: list[Any] = [results]
    if isinstance(stage, str):
        arguments.append(stage)
    elif stage is not None:
        arguments.append(folder / "deepspeed.json")
        arguments[-1].write_text(json.dumps({**ZERO, "zero_optimization": {"stage": stage, **GATHER}}))
    launch(worker, folder, *arguments)
    found = torch.load(results, weights_only=False)
    assert {run["world_size"] for run in found.values()} == {2}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, train(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs in this process."""
    worker = load_worker()
    folder = tmp_path_factory.mktemp("one")
    return {name: worker.run(folder / name, **options) for name, options in worker.runs(1).items()}


def load_worker() -> Any:
    found = importlib.util.spec_from_file_location("worker", WORKER)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    assert a["rows"] == b["rows"], "row ids, tokens and advantages"
    assert a["losses"] == pytest.approx(b["losses"], abs=tolerance)
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        torch.testing.assert_close(value, b["weights"][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["full", "accumulated", "adapter", "audited", "evaluated"])
def test_two_processes_equal_one(two: Any, one: dict[str, Any], name: str) -> None:
    found = two[1][name]
    assert_same(found, one[name], tolerance=3e-6)
    # TRL averages these per micro-batch, then over micro-batches, which accumulation makes more of.
    averaged = ("diffusion/rollout_gap", "kl", "entropy", "clip_ratio") if name == "accumulated" else ()
    timed = ("second", "time", "learning_rate", "grad_norm")
    for theirs, ours in zip(found["log"], one[name]["log"], strict=True):
        for key in theirs.keys() & ours.keys():
            if not key.startswith(averaged) and not any(word in key for word in timed):
                assert theirs[key] == pytest.approx(ours[key], abs=1e-5), key
    if name == "evaluated":
        assert all("eval_solved_at_8" in entry for entry in found["log"] if "eval_loss" in entry)
    if name == "audited":  # the first batch is found out, and what follows is decoded exactly, on both
        gaps = [entry["diffusion/audit_delta"] for entry in found["log"] if "loss" in entry]
        assert gaps[0] > 1e-4 and max(gaps[1:]) < 1e-6


def test_two_processes_link_the_first_one_s_rows_to_replays(two: Any) -> None:
    folder = two[0] / "runs" / "full"
    table = pd.read_parquet(folder / "completions" / "completions_00001.parquet")
    assert table["replay"].isna().tolist() == [False] * 3 + [True] * 5
    text = (folder / "replays" / "step_00001.html").read_text(encoding="utf-8")
    rows = json.loads(text.partition('id="replay">')[2].partition("</script>")[0])["rows"]
    for row, reward in zip(rows, table["reward"], strict=False):
        assert float(row["notes"]["reward"]) == pytest.approx(reward, rel=1e-3)
        assert row["prompt"] == table["prompt"][row["row"]]


def test_two_processes_of_sft_equal_one(two: Any, tmp_path: Path) -> None:
    assert_same(two[1]["sft"], load_worker().run_sft(tmp_path, 1), tolerance=1e-5)
    with_edges = load_worker().run_sft(tmp_path, 1, edges=True)
    assert_same({**two[1]["sft_with_edges"], "rows": []}, {**with_edges, "rows": []}, tolerance=1e-5)
    assert with_edges["losses"] != two[1]["sft"]["losses"] and with_edges["rows"][0][1] > 0


def test_a_model_sharded_by_fsdp_scores_like_a_whole_one(two: Any) -> None:
    (whole, gradients), (sharded, sharded_gradients) = two[1]["scores"]["whole"], two[1]["scores"]["sharded"]
    torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-6)
    for a, b in zip(sharded_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_completions_table_holds_the_rows_of_both_processes(two: Any) -> None:
    tables = sorted((two[0] / "runs" / "full" / "completions").glob("*.parquet"))
    assert len(pd.read_parquet(tables[0])) == 8


def test_two_processes_resume_inside_a_cycle(two: Any) -> None:
    found = two[1]
    assert found["resumed"]["losses"] == found["unbroken"]["losses"]
    for name, value in found["unbroken"]["weights"].items():
        assert torch.equal(value, found["resumed"]["weights"][name]), name


def test_one_process_goes_on_from_a_checkpoint_of_two(
    two: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = str(two[0] / "runs" / "cycle" / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="rl4dlm.training.checkpoints"):
        found = load_worker().run(tmp_path, resume=checkpoint, num_iterations=3, max_steps=4)
    assert "a fresh generation" in caplog.text
    assert found["losses"][:2] == two[1]["unbroken"]["losses"][:2] and len(found["losses"]) == 4


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_equals_one_process(one: dict[str, Any], tmp_path: Path, stage: int) -> None:
    found = train(tmp_path, stage)
    for name in ("full", "adapter", "audited"):
        assert_same(found[name], one[name], tolerance=1e-5)
    said = [entry.get("diffusion/audit_delta") for entry in found["audited"]["log"]]
    assert said == pytest.approx([entry.get("diffusion/audit_delta") for entry in one["audited"]["log"]], abs=1e-5)
    assert found["resumed"]["losses"] == pytest.approx(found["unbroken"]["losses"], abs=1e-6)
