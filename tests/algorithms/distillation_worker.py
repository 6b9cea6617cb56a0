"""What each process of `test_distillation_distributed.py` runs: two passes over a batch for each kind of teacher.

torchrun --nproc_per_node 2 distillation_worker.py RESULTS.pt [deepspeed.json]
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

from rl4dlm import SelfDistillationConfig, SelfDistillationTrainer, save_denoiser, tiny_llada, tiny_tokenizer
from tests.launch import leave
from tests.training.conftest import settings

SAME = {"teacher_view": "same"}
KINDS: dict[str, dict[str, Any]] = {
    "later": {"rewarded_from": 0.5},
    "rounds": {"teacher_step": 0.25, "teacher_step_doubles": True, "sync_ref_model": True, "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 1.0},
    "told": {"teacher": "policy", "teacher_context_column": "hint", "distill_top_k": None, **SAME},
    "told by an adapter's base": {"lora": True, "teacher_context_column": "hint", "distill_top_k": None, **SAME},
    "surest": {"states": "recorded", "positions": "surest", "teacher_view": "subset", "divergence": "ddo",
        "distill_top_k": 64},
    "its completions": {"rollouts_by": "teacher", "divergence": "forward_kl", "num_views": 2, **SAME},
    "d2f": {"rollouts_by": "corpus", "states": "rising", "student_attention": "block_causal", "block_length": 4,
        **SAME},
}  # fmt: skip
"""Settings besides the small ones."""


def right(completions: list[str], **columns: Any) -> list[float]:
    """Right for some completions, so that some processes have more to learn from than others."""
    return [float(sum(map(ord, text)) % 4 == 0) for text in completions]


def run(kind: str, folder: Path, world_size: int, **changes: Any) -> dict[str, Any]:
    """Log and weights of a run of 16 completions, shared out over processes, used twice."""
    model = changes.pop("model", None)
    size = {"per_device_train_batch_size": 16 // world_size, "learning_rate": 0.01, "hard_weight": 1.0}
    values = {**size, **KINDS[kind], **changes}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if values.pop("lora", False) else None
    config = SelfDistillationConfig(**settings(folder, **values))
    names = [f"p{i}" for i in range(8)]
    data = Dataset.from_dict(
        {"prompt": names, "hint": names[::-1], "completion": ["abcdefgh"[: i + 1] for i in range(8)]}
    )
    trainer = SelfDistillationTrainer(
        tiny_llada() if model is None else model, right, config, data, None, tiny_tokenizer(), peft_config=lora
    )
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
    found = {kind: run(kind, folder / kind, world_size, **more) for kind in KINDS}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
