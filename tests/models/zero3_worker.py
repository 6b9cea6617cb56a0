"""One process of several: loads every folder under ZeRO-3 and reports where a gathered weight is not the saved one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import TrainingArguments

from rl4dlm.models.loading import load_denoiser
from tests.launch import leave


def main(root: Path) -> None:
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    arguments = TrainingArguments(output_dir=str(root / "out"), use_cpu=True, bf16=False, deepspeed=settings)
    assert arguments.distributed_state.num_processes == 2
    wrong: list[str] = []
    for folder in sorted(path.parent for path in root.glob("*/*/config.json")):
        model = load_denoiser(folder)
        if not all(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters()):
            wrong.append(f"{folder}: not partitioned")
        expected = torch.load(folder.parent / "weights.pt")
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found = model.state_dict()
            wrong += [f"{folder}: {key}" for key in expected if not torch.equal(found[key], expected[key])]
    (root / f"wrong{torch.distributed.get_rank()}.json").write_text(json.dumps(wrong))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
