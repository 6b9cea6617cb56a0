"""Two processes, one of which is sent SIGTERM in the middle of a step; then the run goes on from its checkpoint.

torchrun --nproc_per_node 2 preemption_worker.py RESULTS.pt TIMES
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.launch import leave


class Ask(TrainerCallback):
    """Sends a signal to this process, if it is the one, within a step."""

    def __init__(self, rank: int, step: int, number: int) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.get_rank() == self.rank and state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def main(results: Path, times: int) -> None:
    found = importlib.util.spec_from_file_location("toys", Path(__file__).parent / "conftest.py")
    assert found is not None and found.loader is not None
    toy = importlib.util.module_from_spec(found)
    found.loader.exec_module(toy)

    def run(folder: Path, callbacks: list[Any], resume: Any = None) -> Any:
        options = {"per_device_train_batch_size": 4, "max_steps": 5, "num_iterations": 3, "optim": "adamw_torch"}
        config = toy.DiffuGRPOConfig(**toy.settings(folder, **options))
        data, tokenizer = toy.prompts(), toy.tiny_tokenizer()
        trainer = toy.RecordingTrainer(toy.tiny_llada(), toy.reward, config, data, None, tokenizer, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def losses(trainer: Any) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    unbroken = losses(run(results.parent / "unbroken", []))
    draw, tried = random.Random(0), []
    for i in range(times):
        folder, step = results.parent / f"run{i}", draw.randint(1, 4)
        number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
        stopped = run(folder, [Ask(draw.randint(0, 1), step, number)])
        kept = sorted(path.name for path in folder.glob("checkpoint-*"))
        again = run(folder, [], "latest")
        tried.append((stopped.preempted, step, kept, losses(again), again.preempted, again._initial_global_step))
    if torch.distributed.get_rank() == 0:
        torch.save({"world_size": torch.distributed.get_world_size(), "unbroken": unbroken, "tried": tried}, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
