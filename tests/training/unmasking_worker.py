"""What each process of `test_unmasking_distributed.py` runs: LLaDOU, with an adapter or without, and resuming.

torchrun --nproc_per_node 2 unmasking_worker.py RESULTS.pt [deepspeed.json]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from peft import LoraConfig

from rl4dlm import LLaDOUConfig, LLaDOUTrainer
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.conftest import prompts, reward, settings

RUNS: dict[str, dict[str, Any]] = {
    "both": {"block_length": 4},
    "policy alone": {"train_denoiser": False},
    "adapter": {"adapter": True},
}


def run(folder: Path, world_size: int, adapter: bool = False, resume: str | None = None, **changes: Any) -> Any:
    """Log and weights of passes over batches of 16 completions."""
    config = LLaDOUConfig(
        **settings(
            folder,
            **{
                **{"per_device_train_batch_size": 16 // world_size, "num_generations": 4, "num_iterations": 2},
                **{"learning_rate": 0.01, "policy_learning_rate": 0.5, "max_grad_norm": 100.0, "max_steps": 3},
                **{"policy_heads": 2, "policy_frequencies": 8},
                **changes,
            },
        )
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    model = tiny_llada(initializer_range=0.1)  # with states that differ between slots
    trainer = LLaDOUTrainer(model, reward, config, prompts(), None, tiny_tokenizer(), peft_config=lora)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "world_size": trainer.accelerator.num_processes,
        "log": trainer.state.log_history,
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


def main(results: Path, deepspeed: str | None) -> None:
    folder, world_size = results.parent, int(os.environ["WORLD_SIZE"])
    found = {}
    options = {} if deepspeed is None else {"deepspeed": deepspeed}
    for name, changes in RUNS.items():
        found[name] = run(folder / name, world_size, **options, **changes)
    saved = {"save_strategy": "steps", "save_steps": 1}
    run(folder / "saved", world_size, **RUNS["both"], **options, **saved)
    from_there = str(folder / "saved" / "checkpoint-1")
    found["resumed"] = run(folder / "resumed", world_size, resume=from_there, **RUNS["both"], **options)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
