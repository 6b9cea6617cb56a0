"""What each process of `test_value_distributed.py` runs: TraceRL with a value model, and resuming in its middle.

torchrun --nproc_per_node 2 value_worker.py RESULTS.pt [deepspeed.json]
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

from rl4dlm import TraceRLConfig, TraceRLTrainer
from rl4dlm.models.tiny import tiny_tokenizer
from tests.launch import leave
from tests.training.conftest import prompts, reward, settings
from tests.training.steps import tiny_llada_that_ends

RUNS: dict[str, dict[str, Any]] = {
    "steps": {"value_model": "steps"},
    "blocks": {"value_model": "blocks", "block_length": 4, "value_rewards": "revealed", "value_trains_trunk": True},
    "adapter": {"value_model": "steps", "value_trains_trunk": True, "adapter": True},
}


def run(folder: Path, world_size: int, adapter: bool = False, resume: str | None = None, **changes: Any) -> Any:
    """Log and weights of three passes over batches of 16 completions."""
    config = TraceRLConfig(
        **settings(
            folder,
            **{
                **{"per_device_train_batch_size": 16 // world_size, "num_generations": 4, "num_iterations": 2},
                **{"beta": 0.0, "learning_rate": 0.01, "value_learning_rate": 0.02, "max_grad_norm": 100.0},
                **{"max_steps": 3, "gae_lambda": 0.9},
                **changes,
            },
        )
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    trainer = TraceRLTrainer(
        tiny_llada_that_ends(), reward, config, prompts(), None, tiny_tokenizer(), peft_config=lora
    )
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
    run(folder / "saved", world_size, **RUNS["blocks"], **options, **saved)
    from_there = str(folder / "saved" / "checkpoint-1")
    found["resumed"] = run(folder / "resumed", world_size, resume=from_there, **RUNS["blocks"], **options)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
