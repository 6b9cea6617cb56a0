"""What each process of a distributed test runs: the small runs of `conftest.py`, results written by the first process.

torchrun --nproc_per_node 2 worker.py RESULTS.pt [deepspeed.json]
"""

from __future__ import annotations

import importlib.util
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
from torch.distributed.fsdp import fully_shard

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.loading import save_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.sft.trainer import DiffusionSFTConfig, DiffusionSFTTrainer
from rl4dlm.tasks.base import Task
from tests.launch import leave


def toys() -> Any:
    """This folder's conftest, which is no module to import."""
    found = importlib.util.spec_from_file_location("toys", Path(__file__).parent / "conftest.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def runs(world_size: int) -> dict[str, dict[str, Any]]:
    """Settings of runs whose optimizer steps take whole generation batches of 8 rows, shared out over processes."""
    rows = 8 // world_size
    common = {"per_device_train_batch_size": rows, "max_steps": 4, "beta": 0.04}
    return {
        "full": {**common, "log_completions": True, "log_replays": 3},
        "accumulated": {**common, "per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2},
        "adapter": {**common, "adapter": True, "activation_checkpointing": True},
        "audited": {
            **common,
            "num_iterations": 1,
            "block_length": 4,
            "cache": "prefix",
            "audit_share": 0.3,  # three rows of eight, wherever they are
            "audit_bound": 1e-9,
            "audit_action": "exact",
            "stop_at_eos": False,  # the same forwards on each process, but for those of audits
        },
        "evaluated": {
            **common,
            "max_steps": 2,
            "eval": True,
            "do_eval": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 8 // world_size,
        },
    }


class Odd(Task):
    """Solved by texts with many characters of odd codes; seven rows, so that processes have different numbers."""

    def _rows(self, split: str) -> list[dict[str, Any]]:
        return [{"prompt": f"{split[0]}{i}"} for i in range(7)]

    def check(self, completion: str, row: Any) -> bool:
        return sum(ord(char) % 2 for char in completion) >= 4


def run(folder: Path, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """One run's losses, rows, weights and log."""
    toy = toys()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if options.pop("adapter", False) else None
    evaluation = toy.prompts(4) if options.pop("eval", False) else None
    model: Any = toy.tiny_llada()
    if options.pop("from_path", False):
        model = str(folder.with_name(f"model-{os.environ.get('RANK', 0)}"))
        if not os.path.exists(model):  # once processes know of each other, only the first one saves
            save_denoiser(toy.tiny_llada(), model, toy.tiny_tokenizer())
    trainer = toy.RecordingTrainer(
        model,
        toy.reward,
        toy.DiffuGRPOConfig(**toy.settings(folder, **options)),
        toy.prompts(),
        evaluation,
        toy.tiny_tokenizer(),
        peft_config=lora,
    )
    if evaluation is not None:
        trainer.check_exactly(Odd(), steps=(4, 8))
    trainer.train(resume_from_checkpoint=resume)
    seen: list[tuple[int, list[int], float]] = []
    for batch in trainer.seen:
        if "row_ids" in batch:
            columns = (batch["row_ids"].tolist(), batch["canvas_ids"].tolist(), batch["advantages"].tolist())
            seen += list(zip(*columns, strict=True))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "world_size": trainer.accelerator.num_processes,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "log": trainer.state.log_history,
        "rows": sorted({(i, tuple(canvas), round(a, 5)) for i, canvas, a in gather_object(seen)}),
        "weights": {name.removeprefix("module."): value for name, value in (weights or {}).items()},
    }


def run_sft(folder: Path, world_size: int, edges: bool = False) -> dict[str, Any]:
    """Masked SFT on texts of different lengths, so that processes hold different numbers of target tokens; with `edges`
    also of effects, which some rows have none of."""
    toy = toys()
    config = DiffusionSFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4 // world_size,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **({"causal_weight": 0.5, "causal_layers": [0, 1], "causal_ratio": 3.0} if edges else {}),
    )
    data = Dataset.from_dict({"prompt": list("abcdefgh"), "completion": ["x" * (1 + i * i % 7) for i in range(8)]})
    if edges:
        data = data.add_column("causal_edges", [[[[1, 2], [0, 1]]] if i % 3 else [] for i in range(8)])
    trainer = DiffusionSFTTrainer(toy.tiny_llada(), config, data, None, toy.tiny_tokenizer())
    trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": [
            (entry["num_tokens"], round(entry.get("diffusion/causal_ratio", 0), 4))
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


def sharded_scores() -> dict[str, Any]:
    """Scores and gradients of a model that FSDP2 shards over the processes, and of the same model whole."""
    whole, sharded = (attach_scoring(tiny_llada()) for _ in range(2))
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 50, (3, 10), generator=generator)
    views = Views(torch.rand(3, 2, 10, generator=generator) < 0.5, torch.ones(3, 2, 6))
    found: dict[str, Any] = {"world_size": torch.distributed.get_world_size()}
    for name, model in (("whole", whole), ("sharded", sharded)):
        scores = score_views(model, DiffusionSpec.of(whole), ids, torch.ones_like(ids), views)
        scores.log_probs.sum().backward()
        gradients = [p.grad for p in model.parameters()]
        full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        found[name] = (scores.log_probs.detach(), full)
    return found


def main(results: Path, deepspeed: str | None) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    folder = results.parent / "runs"
    # Under DeepSpeed models come from a path, since ZeRO-3 shards them while they load; adapters from an instance.
    options = {} if deepspeed is None else {"deepspeed": deepspeed}
    found: dict[str, Any] = {}
    for name, changes in runs(world_size).items():
        if deepspeed is None or name in ("full", "adapter", "audited"):
            from_path = deepspeed is not None and name != "adapter"
            sharded = {"ds3_gather_for_generation": False} if name == "audited" else {}
            found[name] = run(folder / name, from_path=from_path, **changes, **sharded, **options)
    cycle = {"num_iterations": 3, "save_strategy": "steps", "save_steps": 2, **options}
    cycle |= {"per_device_train_batch_size": 8 // world_size, "max_steps": 4}
    found["unbroken"] = run(folder / "cycle", **cycle)
    cycle["save_strategy"] = "no"
    found["resumed"] = run(folder / "again", resume=str(folder / "cycle" / "checkpoint-2"), **cycle)
    if deepspeed is None:
        found["sft"] = run_sft(folder / "sft", world_size)
        found["sft_with_edges"] = run_sft(folder / "sft_with_edges", world_size, edges=True)
        found["scores"] = sharded_scores()
    assert torch.distributed.get_world_size() == world_size
    if torch.distributed.get_rank() == 0:
        torch.save(found, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
