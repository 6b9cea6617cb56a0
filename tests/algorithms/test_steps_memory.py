"""An update that scores recorded steps takes as much memory for many of them as for few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("steps_memory_worker.py")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_an_update_does_not_depend_on_the_number_of_recorded_steps() -> None:
    """16 steps beside 2, in a process that gives freed memory back; and all views at once, which is told apart."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    cases = json.dumps([[2, True], [16, True], [16, False]])
    answer = subprocess.run(
        [sys.executable, str(WORKER), cases], env=environment, check=True, capture_output=True, text=True
    )
    few, many, together = json.loads(answer.stdout.splitlines()[-1])
    assert few > 5 and many < 1.25 * few, (few, many)
    assert together > 2 * few, "the measurement tells memory of views apart"
