"""What each process of `test_zoo_distributed.py` runs: two passes over a batch with every algorithm.

torchrun --nproc_per_node 2 zoo_worker.py RESULTS.pt [deepspeed.json, or rest]
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
from rl4dlm.models.loading import save_denoiser
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.conftest import settings

THRESHOLD = {"schedule": "threshold", "denoising_steps": None, "schedule_args": {"threshold": 0.011}}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "CoupledGRPOTrainer": {"beta": 0.04},
    "UniGRPOTrainer": {"beta": 0.04},
    "SPGTrainer": {"block_length": 4},
    "StableDRLTrainer": {"block_length": 4},
    "DiffusionGDPOTrainer": {"beta": 0.04},
    "ESPOTrainer": {"beta": 0.04},
    "EBPOTrainer": {"beta": 0.04, "num_views": 2},
    "LightningRLTrainer": {"min_speed_range": 0.0, "speed_reward": "letters"},
    "GDSDTrainer": {"beta": 0.04, "num_views": 2},
    "BGPOTrainer": {"beta": 0.04, "num_views": 2},
    "DMPOTrainer": {"num_views": 2},
    "SelfDistillationTrainer": {"rewarded_from": 0.5, "hard_weight": 1.0},
    "WD1Trainer": {},
    "WD1Trainer+predictions": {"num_predicted_steps": 2, **THRESHOLD},
    "JustGRPOTrainer": {"denoising_steps": 8},
    "DreamCoderRLTrainer": {"substitute_groups": False},
    "CJGRPOTrainer": {},
    "MDPOTrainer": {"num_trained_steps": 2, "num_iterations": 2},
    "TreeRPOTrainer": {"branches": [2, 2], "distillation": 0.1, "distillation_steps": 2},
    "AGRPOTrainer": {"num_scored_steps": 2, "beta": 0.04},
    "EGSPOTrainer": {"num_scored_steps": 2, "step_lambda": 0.5},
    "TraceRLTrainer": THRESHOLD,
    "D2Trainer": {"num_scored_steps": 2, **THRESHOLD},
    "DiPOTrainer": {"beta": 0.04, **THRESHOLD},
    "BernoulliUnmaskingTrainer": {
        "denoising_steps": None, "policy_hidden_size": 8, "temperature": 0.8, "warmup_steps": 0,
    },
    "CtrlDiffTrainer": {"denoising_steps": None, "block_sizes": [1, 2, 4], "schedule_args": {"threshold": 0.0}},
    "IGPOTrainer": {
        "beta": 0.04, "free_tail": 0, "hint_ratio": [0.5, 1.0], "chunk_length": [1, 2], "hide_answer": False,
    },
}  # fmt: skip
"""Settings besides the small ones, by trainer, and by what is behind a plus where one is run twice."""
SPLIT_GROUPS = {"StableDRLTrainer": {}, "CoupledGRPOTrainer": {"clip": "unconditional", "self_normalize": "group"}}
"""Algorithms whose weights are normalised over groups; also run with one that is split over processes and steps."""
FROZEN = ("BernoulliUnmaskingTrainer", "CtrlDiffTrainer")
"""Those that train a policy beside a model that stays as it is, and so no adapter."""
RUNS = [(name, number % 2 == 1 and name not in FROZEN) for number, name in enumerate(ALGORITHMS)]
"""Each algorithm once, on whole models and on adapters in turn; the other of the two is left to the slow tests."""
REST = [(name, not adapter) for name, adapter in RUNS if name not in FROZEN]
ONE_VIEW = {
    "ESPOTrainer": {"num_views": 2},
    "SPGTrainer": {"num_views": 3},
    "TraceRLTrainer": {},
    "SelfDistillationTrainer": {"num_views": 2},
}
"""Algorithms that are also run under DeepSpeed, with several views that are scored one after another."""


def right(completions: list[str], **columns: Any) -> list[float]:
    """Right for some completions, so that groups without any are found on some processes and not on others."""
    return [float(sum(map(ord, text)) % 4 == 0) for text in completions]


def letters(completions: list[str], **columns: Any) -> list[float]:
    """Stands for a reward of speed."""
    return [sum(c.islower() for c in text) / 8 for text in completions]


def run(name: str, folder: Path, world_size: int, adapter: bool, model: Any = None, **changes: Any) -> dict[str, Any]:
    """Rows, log and weights of a run of 16 completions, shared out over processes, used twice."""
    trainer_class = getattr(rl4dlm, name.partition("+")[0])
    size = {"per_device_train_batch_size": 16 // world_size, "learning_rate": 0.01}
    changes = {**size, **ALGORITHMS[name], **changes}
    config = trainer_class.config_class(**settings(folder, **changes))
    data = Dataset.from_dict({"prompt": [f"p{i}" for i in range(8)], "solution": ["abcdefgh"] * 8})
    rewards: Any = [right, letters] if name == "LightningRLTrainer" else right
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    trainer = trainer_class(
        tiny_llada() if model is None else model, rewards, config, data, None, tiny_tokenizer(), peft_config=lora
    )
    rows: list[Any] = []
    loss = trainer.loss

    def recorded(scores: Any, batch: dict[str, Any]) -> Any:
        columns = (batch[name].tolist() for name in ("row_ids", "canvas_ids", "advantages"))
        rows.extend((i, tuple(canvas), round(a, 5)) for i, canvas, a in zip(*columns, strict=True))
        return loss(scores, batch)

    trainer.loss = recorded
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    if "deepspeed" in changes:  # which gathers what is sharded
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {
        "world_size": trainer.accelerator.num_processes,
        "rows": sorted(set(gather_object(rows))),
        "log": trainer.state.log_history,
        "weights": {name.removeprefix("module."): p.detach().clone() for name, p in weights.items()},
    }


def run_one_view(name: str, folder: Path, world_size: int, adapter: bool = False, **changes: Any) -> dict[str, Any]:
    """A run whose views are scored one after another; an adapter's with layers that are checkpointed re-entrantly."""
    if adapter:
        changes |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
        changes |= {"ddp_find_unused_parameters": False}  # with which DDP refuses re-entrant layers, views or not
    return run(name, folder, world_size, adapter, one_view=True, **ONE_VIEW[name], **changes)


def main(results: Path, deepspeed: str | None) -> None:
    folder, world_size = results.parent, int(os.environ["WORLD_SIZE"])
    if deepspeed in (None, "rest"):
        found: dict[Any, Any] = {
            (name, adapter): run(name, folder / f"{name}-{adapter}", world_size, adapter)
            for name, adapter in (REST if deepspeed else RUNS)
        }
    if deepspeed is None:
        found |= {
            ("groups", name): run(
                name, folder / f"{name}-groups", world_size, False, num_generations=16,
                per_device_train_batch_size=8 // world_size, gradient_accumulation_steps=2, **changes,
            )
            for name, changes in SPLIT_GROUPS.items()
        }  # fmt: skip
        found |= {("one view", name): run_one_view(name, folder / name, world_size, adapter=True) for name in ONE_VIEW}
    elif deepspeed != "rest":
        # ZeRO-3 shards models while they load, so that they come from a path, where they are before it is switched on.
        model = str(folder / f"model-{os.environ['RANK']}")
        save_denoiser(tiny_llada(), model, tiny_tokenizer())
        options = {"model": model, "deepspeed": deepspeed}
        found = {
            (name, adapter): run_one_view(name, folder / f"{name}-{adapter}", world_size, adapter, **options)
            for name in ONE_VIEW
            for adapter in (False, True)
        }
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
