"""What each process of `test_elbo_kto.py` runs: three steps of ELBO-KTO on rows that come in the same order.

torchrun --nproc_per_node 2 kto_worker.py RESULTS.pt
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset

from rl4dlm import ELBOKTOConfig, ELBOKTOTrainer, tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.steps import SMALL_RUN

COMPARED = {
    "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy",
    "num_tokens", "elbo_kto/baseline",
}  # fmt: skip


def run(folder: Path, world_size: int) -> dict[str, Any]:
    """Log and weights of a run with 4 rows a step."""
    size = 4 // world_size
    settings = {**SMALL_RUN, "max_steps": 3, "learning_rate": 0.05, "beta": 0.5, "num_views": 2}
    args = ELBOKTOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        **settings,
    )
    rows = [{"prompt": f"{i}+1=", "completion": "abcd"[: 1 + i % 4], "label": i % 4 < 2} for i in range(12)]
    model = tiny_llada(initializer_range=0.2)
    trainer = ELBOKTOTrainer(model, None, args, Dataset.from_list(rows), None, tiny_tokenizer())
    trainer.train()
    weights = {name.removeprefix("module."): p.detach().clone() for name, p in trainer.model.named_parameters()}
    return {"world_size": trainer.accelerator.num_processes, "log": trainer.state.log_history, "weights": weights}


if __name__ == "__main__":
    results = Path(sys.argv[1])
    found = run(results.parent / "two", int(os.environ["WORLD_SIZE"]))
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    leave()
