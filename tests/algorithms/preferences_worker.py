"""What each process of `test_preferences_distributed.py` runs: three steps on rows that come in the same order.

torchrun --nproc_per_node 2 preferences_worker.py RESULTS.pt [deepspeed.json]
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
from peft import LoraConfig

import rl4dlm
from rl4dlm import save_denoiser, tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.steps import SMALL_RUN

TRAINERS = {
    "ELBOKTO": {"train_sampling_strategy": "sequential", "beta": 0.5},
    "VRPO": {"loss_type": ["sigmoid"], "loss_weights": None},
}
# Where one process has what is wanted, and the other what is not.
WANTED = [{"prompt": f"{i}+1=", "completion": "abcd"[: 1 + i % 4], "label": i % 4 < 2} for i in range(12)]
PAIRS = [{"prompt": f"{i}+1=", "chosen": "abcd"[: 1 + i % 4], "rejected": "zyx"[: 1 + i % 3]} for i in range(12)]


def run(name: str, folder: Path, world_size: int, adapter: bool = False, **changes: Any) -> dict[str, Any]:
    """Log and weights of a run with 4 rows a step, shared out over processes."""
    model = changes.pop("model", None)
    values = {"per_device_train_batch_size": 4 // world_size, "learning_rate": 0.05, "num_views": 2, "max_steps": 3}
    values |= {"output_dir": str(folder), "train_sampling_strategy": "sequential", "one_view": True}
    made = getattr(rl4dlm, f"{name}Trainer")
    args = made.config_class(**{**SMALL_RUN, **values, **TRAINERS[name], **changes})
    rows = Dataset.from_list(WANTED if name == "ELBOKTO" else PAIRS)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    trainer = made(tiny_llada() if model is None else model, None, args, rows, None, tiny_tokenizer(), peft_config=lora)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    if "deepspeed" in changes:  # which gathers what is sharded
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {
        "world_size": trainer.accelerator.num_processes,
        "log": trainer.state.log_history,
        "weights": {name.removeprefix("module."): p.detach().clone() for name, p in weights.items()},
    }


def main(results: Path, deepspeed: str | None) -> None:
    folder, world_size = results.parent, int(os.environ["WORLD_SIZE"])
    more: dict[str, Any] = {}
    if deepspeed is not None:
        # ZeRO-3 shards models while they load, so that they come from a path, where they are before it is switched on.
        more = {"model": str(folder / f"model-{os.environ['RANK']}"), "deepspeed": deepspeed}
        save_denoiser(tiny_llada(), more["model"], tiny_tokenizer())
    found = {
        (name, adapter): run(name, folder / f"{name}-{adapter}", world_size, adapter, **more)
        for name in TRAINERS
        for adapter in (False, True)
    }
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
