"""What each process of `test_zoo_distributed.py` runs: two passes over a batch with every algorithm.

torchrun --nproc_per_node 2 zoo_worker.py RESULTS.pt
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig

import rl4dlm
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.algorithms.conftest import settings

ALGORITHMS: dict[str, dict[str, Any]] = {
    "CoupledGRPOTrainer": {"beta": 0.04},
    "UniGRPOTrainer": {"beta": 0.04},
    "SPGTrainer": {"block_length": 4},
    "DiffusionGDPOTrainer": {"beta": 0.04},
    "ESPOTrainer": {"beta": 0.04},
    "BGPOTrainer": {"beta": 0.04, "num_views": 2},
    "DMPOTrainer": {"num_views": 2},
    "WD1Trainer": {},
    "JustGRPOTrainer": {"denoising_steps": 8},
    "DreamCoderRLTrainer": {"substitute_groups": False},
    "IGPOTrainer": {
        "beta": 0.04, "free_tail": 0, "hint_ratio": [0.5, 1.0], "chunk_length": [1, 2], "hide_answer": False,
    },
}  # fmt: skip
"""Settings besides the small ones."""


def right(completions: list[str], **columns: Any) -> list[float]:
    """Right for some completions, so that groups without any are found on some processes and not on others."""
    return [float(sum(map(ord, text)) % 4 == 0) for text in completions]


def run(name: str, folder: Path, world_size: int, adapter: bool) -> dict[str, Any]:
    """Rows, log and weights of a run of 16 completions, shared out over processes, used twice."""
    trainer_class = getattr(rl4dlm, name)
    config = trainer_class.config_class(
        **settings(folder, per_device_train_batch_size=16 // world_size, learning_rate=0.01, **ALGORITHMS[name])
    )
    data = Dataset.from_dict({"prompt": [f"p{i}" for i in range(8)], "solution": ["abcdefgh"] * 8})
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    trainer = trainer_class(tiny_llada(), right, config, data, None, tiny_tokenizer(), peft_config=lora)
    rows: list[Any] = []
    loss = trainer.loss

    def recorded(scores: Any, batch: dict[str, Any]) -> Any:
        columns = (batch[name].tolist() for name in ("row_ids", "canvas_ids", "advantages"))
        rows.extend((i, tuple(canvas), round(a, 5)) for i, canvas, a in zip(*columns, strict=True))
        return loss(scores, batch)

    trainer.loss = recorded
    trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "rows": sorted(set(gather_object(rows))),
        "log": trainer.state.log_history,
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


def main(results: Path) -> None:
    found = {
        (name, adapter): run(name, results.parent / f"{name}-{adapter}", int(os.environ["WORLD_SIZE"]), adapter)
        for name in ALGORITHMS
        for adapter in (False, True)
    }
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
