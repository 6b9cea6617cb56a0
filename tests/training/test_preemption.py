"""Stopped and killed runs go on as if nothing had happened: R6 (signals on two processes), R3 (SIGKILL)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, launch


@pytest.mark.distributed
@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_r6_a_signal_to_one_of_two_processes_leaves_a_complete_checkpoint(tmp_path: Path, times: int) -> None:
    results = tmp_path / "results.pt"
    launch(Path(__file__).parent / "preemption_worker.py", tmp_path, results, times)
    found = torch.load(results, weights_only=True)
    assert found["world_size"] == 2 and len(found["unbroken"]) == 5
    for stopped, step, kept, losses, stopped_again, first in found["tried"]:
        assert stopped and not stopped_again
        assert kept == [f"checkpoint-{step}"] and first == step
        assert losses == found["unbroken"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_r3_killed_at_any_moment_a_run_goes_on_bit_equal(tmp_path: Path, kills: int) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).parent / "kill_worker.py"), str(tmp_path), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    unbroken, *runs = json.loads((tmp_path / "results.json").read_text())
    assert len(unbroken) == 8 and len(runs) == kills
    assert all(losses == unbroken for losses in runs)
