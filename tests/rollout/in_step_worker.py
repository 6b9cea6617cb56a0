"""One process of several that decode with one sharded model: each its own rows, of which some end early."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.launch import leave
from tests.rollout.queues import BLOCK, BLOCKS, RUNS, model, prompts

SHARES = (slice(0, 5), slice(5, 8))


def sharded(kind: str):
    """The model in shards, and the accelerator's own way to call it."""
    torch.manual_seed(0)
    whole = attach_scoring(model())
    if kind == "zero3":
        import deepspeed

        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        engine, *_ = deepspeed.initialize(model=whole, config={**settings, "zero_allow_untested_optimizer": True})
        return engine.module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in whole.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def main(kind: str, folder: Path) -> None:
    if kind == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2

    def in_step(working: bool) -> bool:
        count = torch.tensor(float(working))
        torch.distributed.all_reduce(count)
        return bool(count > 0)

    shards = sharded(kind)
    engine = RolloutEngine(shards, max_batch_rows=2, in_step=in_step)
    rows = list(range(8))[SHARES[rank]]
    found = []
    for seed, settings in enumerate(RUNS):
        rollout = engine.generate([prompts()[row] for row in rows], DecodingConfig(**settings), row_ids=rows, seed=seed)
        found.append((rollout.canvas, rollout.trace.commit_step, rollout.nfe))
    shards.config.diffusion.update(attention="block_causal", block_length=BLOCK)  # idle forwards know of blocks, too
    engine = RolloutEngine(shards, max_batch_rows=2, in_step=in_step)
    rollout = engine.generate([prompts()[row] for row in rows], DecodingConfig(**BLOCKS), row_ids=rows, seed=0)
    found.append((rollout.canvas, rollout.trace.commit_step, rollout.nfe))
    torch.save(found, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
