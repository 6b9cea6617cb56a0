"""Runs that are killed at random moments and go on from the newest checkpoint, each a fork of this process.

kill_worker.py FOLDER KILLS
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: Path, kills: int) -> None:
    found = importlib.util.spec_from_file_location("toys", Path(__file__).parent / "conftest.py")
    assert found is not None and found.loader is not None
    toy = importlib.util.module_from_spec(found)
    found.loader.exec_module(toy)

    def run(run_dir: Path, started: Path) -> None:
        options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        config = toy.DiffuGRPOConfig(**toy.settings(run_dir, save_total_limit=3, num_iterations=3, **options))
        trainer = toy.RecordingTrainer(toy.tiny_llada(), toy.reward, config, toy.prompts(), None, toy.tiny_tokenizer())
        started.touch()
        trainer.train(resume_from_checkpoint="latest")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (run_dir / "losses.json").write_text(json.dumps(losses))

    def forked(run_dir: Path, delay: float | None) -> float:
        started = folder / "started"
        started.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(run_dir, started)
                status = 0
            finally:
                os._exit(status)
        while not started.exists():
            time.sleep(0.002)
        begun = time.monotonic()
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert delay is not None or status == 0
        return time.monotonic() - begun

    seconds, draw = forked(folder / "unbroken", None), random.Random(0)
    for i in range(kills):
        run_dir = folder / f"run{i}"
        forked(run_dir, draw.uniform(0, seconds))
        forked(run_dir, draw.uniform(0, seconds / 2))
        forked(run_dir, None)
    names = ["unbroken", *(f"run{i}" for i in range(kills))]
    read = [json.loads((folder / name / "losses.json").read_text()) for name in names]
    (folder / "results.json").write_text(json.dumps(read))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
