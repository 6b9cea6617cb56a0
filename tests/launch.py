"""Starts a worker script in two processes on this machine (gloo), and ends such a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def launch(worker: Path, folder: Path, *arguments: object) -> None:
    """Runs `worker arguments` as two processes, in a folder, and fails with what they have said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    done = subprocess.run(
        [*command, f"--master_port={port}", str(worker), *map(str, arguments)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(done.stdout[-2000:] + done.stderr[-4000:])


def leave() -> None:
    """Ends a worker once all have come here.

    Without the interpreter's own end: with DeepSpeed loaded, one in six or so processes aborts there ("terminate called
    without an active exception"), after all work is done.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
