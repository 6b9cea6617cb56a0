"""What each process of the distributed test of unscored rows runs: the second process has no row with an advantage.

torchrun --nproc_per_node 2 waste_worker.py RESULTS.pt [deepspeed.json]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from rl4dlm import DiffuGRPOConfig, DiffuGRPOTrainer, save_denoiser, tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.conftest import prompts, reward, settings


def first_group_only(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """`reward` for the first four rows of all processes, one number for the others."""
    rank = int(os.environ.get("RANK", 0))
    return [value if rank == 0 and i < 4 else 0.3 for i, value in enumerate(reward(completions))]


def run(folder: Path, world_size: int, deepspeed: str | None = None) -> dict[str, Any]:
    """Losses, weights and the share of rows that were scored, of two optimizer steps on a batch of two groups."""
    changes: dict[str, Any] = {"deepspeed": deepspeed} if deepspeed else {}
    changes |= {"per_device_train_batch_size": 8 // world_size, "beta": 0.0, "num_iterations": 2, "max_steps": 2}
    model: Any = tiny_llada()
    if deepspeed:  # ZeRO-3 shards models while they load
        model = str(folder.with_name(f"model-{os.environ.get('RANK', 0)}"))
        save_denoiser(tiny_llada(), model, tiny_tokenizer())
    config = DiffuGRPOConfig(**settings(folder, **changes))
    trainer = DiffuGRPOTrainer(model, first_group_only, config, prompts(), None, tiny_tokenizer())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "world_size": trainer.accelerator.num_processes,
        "losses": [entry["loss"] for entry in log],
        "share": [entry["diffusion/rows_scored_share"] for entry in log],
        "weights": {name.removeprefix("module."): value for name, value in (weights or {}).items()},
    }


if __name__ == "__main__":
    results, deepspeed = Path(sys.argv[1]), (sys.argv[2] if len(sys.argv) > 2 else None)
    found = run(results.parent / "run", 2, deepspeed)
    if torch.distributed.get_rank() == 0:
        torch.save({"run": found}, results)
    leave()
