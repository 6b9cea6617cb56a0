"""What each process of the guard's distributed test runs: a loss that is NaN on the second process at one step.

torchrun --nproc_per_node 2 guard_worker.py RESULTS.pt [deepspeed.json]
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from rl4dlm import DiffuGRPOConfig, DiffuGRPOTrainer, tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.conftest import prompts, reward, settings


class BrokenOnOneProcess(DiffuGRPOTrainer):
    """NaN in the second process's loss of the steps named."""

    broken: tuple[int, ...] = ()

    def loss(self, scores: Any, batch: dict[str, Any]) -> torch.Tensor:
        value = super().loss(scores, batch)
        if self.state.global_step in self.broken and self.accelerator.process_index == 1:
            return value * torch.nan
        return value


def run(folder: Path, broken: tuple[int, ...], deepspeed: str | None) -> dict[str, Any]:
    changes: dict[str, Any] = {"deepspeed": deepspeed} if deepspeed else {}
    config = DiffuGRPOConfig(
        **settings(folder, per_device_train_batch_size=4, max_steps=4, num_iterations=2, seed=1, **changes)
    )
    trainer = BrokenOnOneProcess(tiny_llada(), reward, config, prompts(), None, tiny_tokenizer())
    trainer.broken = broken
    weights: list[torch.Tensor] = []

    def remember(*_: Any) -> None:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        whole = contextlib.nullcontext()
        if deepspeed:  # ZeRO-3 shows its weights only so
            import deepspeed as zero

            whole = zero.zero.GatheredParameters(list(policy.parameters()))
        with torch.no_grad(), whole:
            found = [
                p.detach().float().reshape(-1).clone()
                for p in trainer.accelerator.unwrap_model(trainer.model).parameters()
            ]
            weights.append(torch.cat(found))

    from transformers import TrainerCallback

    class Remember(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            remember()

    trainer.add_callback(Remember())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": weights, "log": log, "world_size": trainer.accelerator.num_processes}


if __name__ == "__main__":
    results, deepspeed = Path(sys.argv[1]), (sys.argv[2] if len(sys.argv) > 2 else None)
    found = run(results.parent / "run", (1,), deepspeed)
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, found)
    if torch.distributed.get_rank() == 0:
        torch.save(everyone, results)
    leave()
