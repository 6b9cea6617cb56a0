"""What each way to shard a model sends and holds, counted on two processes of this machine, and a model of it for more.

    python benchmarks/sharding.py

Starts two processes (gloo), in which the same small denoiser is trained under DDP, ZeRO-2, ZeRO-3 and FSDP2: one update
of one micro-batch, one of two, and a decoding forward, which takes no gradient. Every collective is counted where torch
dispatches it, by kind and size, so that nothing depends on the machine's speed. What a rank holds is the storage of all
tensors that Python can reach, between updates and before an optimizer step. Processor time is that of the process: of
CPUs and gloo, where sending is copying, so that it says nothing of GPUs.

Writes `benchmarks/results/sharding.json` and the tables of docs/scaling.md. Two minutes of two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results" / "sharding.json"
KINDS = ("ddp", "zero2", "zero3", "fsdp2")
TITLES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
ROWS, LENGTH, TIMED = 4, 48, 6
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}
"""Names of torch's operators -> what they are, of those that carry tensors."""
MEASURED = ("<!-- measured: made by benchmarks/sharding.py -->", "<!-- end of measured -->")
MODELLED = ("<!-- modelled: made by benchmarks/sharding.py -->", "<!-- end of modelled -->")


def sent(collectives: Mapping[str, int], ranks: int) -> float:
    """Bytes that a rank sends for these collectives, by ring algorithms.

    Args:
        collectives: kind -> bytes of the whole tensors, as every rank has them before or after.
        ranks: that take part.
    """
    share = (ranks - 1) / ranks
    factors = {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "reduce": share,
        "broadcast": share,
    }
    return sum(factors[kind] * size for kind, size in collectives.items())


def modelled(kind: str, *, weights: float, gradients: float, micro_batches: int = 1) -> dict[str, float]:
    """Whole-tensor bytes of an update, by kind of collective: what docs/scaling.md calls the model.

    Args:
        kind: of sharding. weights, gradients: bytes of all trained weights, and of their gradients.
        micro_batches: of an update; what is gathered layer by layer is gathered for each of them.
    """
    if kind == "ddp":
        return {"all_reduce": gradients}
    if kind == "zero2":
        return {"all_reduce": micro_batches * gradients, "all_gather": weights}
    return {"all_gather": 2 * micro_batches * weights, "reduce_scatter": micro_batches * gradients}


# --- a process of the two ---------------------------------------------------------------------------------------------


def worker(kind: str, output: Path) -> None:
    """Measures one kind of sharding; the first process writes what was found."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from rl4dlm.likelihood.scoring import score_views
    from rl4dlm.likelihood.views import Views
    from rl4dlm.models.scoring import attach_scoring
    from rl4dlm.models.spec import DiffusionSpec
    from rl4dlm.models.tiny import tiny_llada
    from tests.launch import leave

    class Counting(TorchDispatchMode):
        """Adds up the bytes of tensors that collectives get, by kind."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and func._opname not in ("barrier", "monitored_barrier_"):
                kind = COLLECTIVES[func._opname]
                sides = [sum(t.nbytes for t in _tensors(argument)) for argument in args[:2]]
                self.sizes[kind] += max(sides)  # the whole of what is gathered or scattered
            return func(*args, **(kwargs or {}))

    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    whole = attach_scoring(tiny_llada(**SIZES))
    parameters = sum(p.numel() for p in whole.parameters())
    spec = DiffusionSpec.of(whole)
    model, step, backward = _sharded(kind, whole)
    ids = torch.randint(7, 50, (ROWS, LENGTH))
    views = Views(torch.rand(ROWS, 1, LENGTH) < 0.5, torch.ones(ROWS, 1, LENGTH - 4))

    def update(micro_batches: int, held: Callable[[], int] = lambda: 0) -> int:
        for i in range(micro_batches):
            last = i == micro_batches - 1
            scores = score_views(model, spec, ids, torch.ones_like(ids), views)
            backward(-scores.log_probs.mean() / micro_batches, last)
        before = held()
        step()
        return before

    def decode() -> None:
        with torch.no_grad():
            score_views(model, spec, ids, torch.ones_like(ids), views)

    def counted(run: Callable[[], Any]) -> dict[str, int]:
        with Counting() as mode:
            run()
        return {key: int(value) for key, value in sorted(mode.sizes.items()) if value >= 1024}  # flags are no load

    update(1)  # what is made once, such as the optimizer's state
    found: dict[str, Any] = {
        "kind": kind,
        "parameters": parameters,
        "held": _held(torch),
        "held_before_step": update(1, lambda: _held(torch)),
        "update": counted(lambda: update(1)),
        "update_of_two": counted(lambda: _accumulated(kind, model, update)),
        "forward": counted(decode),
    }
    start = time.process_time()
    for _ in range(TIMED):
        update(1)
    found["processor_seconds"] = (time.process_time() - start) / TIMED
    if rank == 0:
        output.write_text(json.dumps(found))
    leave()


def _sharded(kind: str, whole: Any) -> tuple[Any, Callable[[], None], Callable[[Any, bool], None]]:
    """(what is called, an optimizer step, backward of a micro-batch's loss)."""
    import torch

    if kind.startswith("zero"):
        import deepspeed

        size = sum(p.numel() for p in whole.parameters())
        settings = {
            "train_micro_batch_size_per_gpu": ROWS,
            # DeepSpeed's defaults as shares of 8 billion parameters: a small model is gathered as a large one is.
            "zero_optimization": {
                "stage": int(kind[-1]),
                "reduce_bucket_size": size // 16,
                "allgather_bucket_size": size // 16,
                "stage3_max_live_parameters": size // 8,
                "stage3_max_reuse_distance": size // 8,
                "stage3_prefetch_bucket_size": size // 160,
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4)
        engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)

        def backward(loss: Any, last: bool) -> None:
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss, scale_wrt_gas=False)

        return engine, engine.step, backward
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in whole.model.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(whole, mesh=mesh)
    else:
        model = torch.nn.parallel.DistributedDataParallel(whole, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return model, step, lambda loss, last: loss.backward()


def _accumulated(kind: str, model: Any, update: Callable[[int], int]) -> None:
    """An update of two micro-batches, of which DDP leaves out the first one's exchange, as accelerate has it do."""
    if kind != "ddp":
        update(2)
        return
    forward, calls = model.forward, iter([True, False])

    def call(*args: Any, **kwargs: Any) -> Any:
        model.require_backward_grad_sync = not next(calls)
        return forward(*args, **kwargs)

    model.forward = call
    try:
        update(2)
    finally:
        del model.forward
        model.require_backward_grad_sync = True


def _tensors(argument: Any) -> list[Any]:
    """Tensors in an argument of a collective: one, a list, or a list of lists."""
    if isinstance(argument, list | tuple):
        return [tensor for item in argument for tensor in _tensors(item)]
    return [argument] if hasattr(argument, "nbytes") else []


def _held(torch: Any) -> int:
    """Bytes of the storages of all float tensors of this process."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        try:
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                local = item.to_local() if hasattr(item, "to_local") else item
                for tensor in (local, local.grad if local.is_leaf else None):
                    if tensor is not None:
                        found = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                        storage = found.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        except (ReferenceError, RuntimeError, NotImplementedError):
            continue  # an object that is going, or a tensor without memory
    return sum(storages.values())


# --- both, and the page -----------------------------------------------------------------------------------------------


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Runs the two processes of a kind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    output = folder / f"{kind}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", __file__, "--kind", kind, "--result", str(output)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if not output.exists():
        raise RuntimeError(f"{kind}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def measured_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Bytes over those of the weights, so that the model's size does not matter."""
    weights = 4 * found["ddp"]["parameters"]
    lines = [
        "| | sent, update of one micro-batch | of two | sent, forward without gradient | held between updates | "
        "held before a step | processor time of an update |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        entry = found[kind]
        cells = [sent(entry[what], 2) for what in ("update", "update_of_two", "forward")]
        cells += [entry["held"], entry["held_before_step"]]
        time_ratio = entry["processor_seconds"] / found["ddp"]["processor_seconds"]
        row = " | ".join(f"{cell / weights:.2f}" for cell in cells)
        lines.append(f"| {TITLES[kind]} | {row} | {time_ratio:.1f} |")
    return "\n".join(lines)


def modelled_table(parameters: float = 8.02e9, ranks: tuple[int, ...] = (8, 16, 64)) -> str:
    """GB that a GPU sends in an update of LLaDA-8B, all weights in bfloat16."""
    lines = [
        "| GB sent per GPU and update | " + " | ".join(f"{n} GPUs" for n in ranks) + " | 8 micro-batches, 16 GPUs |",
        "| --- |" + " ---: |" * (len(ranks) + 1),
    ]
    for kind in KINDS:
        cells = [
            sent(modelled(kind, weights=2 * parameters, gradients=2 * parameters, micro_batches=m), n) / 1e9
            for n, m in [*((n, 1) for n in ranks), (16, 8)]
        ]
        lines.append(f"| {TITLES[kind]} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    return "\n".join(lines)


def into_page(markers: tuple[str, str], text: str) -> None:
    """Puts a table between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not end:
        raise ValueError(f"{PAGE} lacks one of the markers {markers}")
    PAGE.write_text(f"{before}{markers[0]}\n\n{text}\n\n{markers[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="the others stay as they were")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "sharding", help="for what processes leave")
    parser.add_argument("--kind", help=argparse.SUPPRESS)  # this process's
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        worker(options.kind, options.result)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text())["found"] if RESULTS.exists() else {}
    for kind in options.kinds:
        found[kind] = measure(kind, options.folder.resolve())
        print(json.dumps(found[kind]), flush=True)
    from rl4dlm.evaluation import machine, versions

    about = {"machine": machine(), "versions": versions(), "ranks": 2, "sizes": SIZES}
    RESULTS.write_text(
        json.dumps({**about, "found": {kind: found[kind] for kind in KINDS if kind in found}}, indent=1) + "\n"
    )
    if found.keys() >= set(KINDS):
        into_page(MEASURED, measured_table(found))
        into_page(MODELLED, modelled_table())


if __name__ == "__main__":
    main()
