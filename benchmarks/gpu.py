"""How fast 8B models decode on a GPU, against what it could do: every cache policy, bfloat16, random weights.

    python benchmarks/gpu.py

Decodes 64 rows of 256 prompt tokens and 256 slots with models that have the shapes of LLaDA-8B (full attention, blocks
of 32) and SDAR-8B (attention in blocks of 4 to 32), and prints and writes, to `benchmarks/results/gpu.json` and `.md`,
tokens per second beside a bound. The bound of a step is the larger of two times: what it must compute over the peak of
the tensor cores, and what it must read over the bandwidth of the memory; `--flops` and `--bandwidth` are an H200's. No
published number of another program is compared with: what those decode differs in more than the cache.

Needs one CUDA device with 60 GiB and ends with status 1 where there is none. It takes less than eight minutes: variants
are measured once, in the order of what they say, and those for which `--seconds` leaves no time are named and left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.counting import forwards  # noqa: E402
from benchmarks.positions import Grid, positions_fed, steps  # noqa: E402
from rl4dlm import DecodingConfig, RolloutEngine, tiny_llada  # noqa: E402
from rl4dlm.evaluation import machine, versions  # noqa: E402
from rl4dlm.models.families import FAMILIES  # noqa: E402
from rl4dlm.models.family import RECORD, HubConfig  # noqa: E402
from rl4dlm.models.spec import DiffusionSpec  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NEEDED_GIB = 60
COMPILING = 120
"""Seconds that the compiler is given."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a dense model with gated feed-forward layers; `head` is the size of an attention head."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head: int
    inner: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """W: weights that every position goes through."""
        attention = 2 * self.hidden * self.head * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def output(self) -> int:
        """H: weights of the vocabulary head."""
        return self.hidden * self.vocabulary

    @property
    def bytes_per_key(self) -> int:
        """Of keys and values of one position, in all layers, in bfloat16."""
        return 2 * self.layers * self.key_heads * self.head * 2


LLADA_8B = Sizes(4096, 32, 32, 32, 128, 12_288, 126_464)
SDAR_8B = Sizes(4096, 36, 32, 8, 128, 12_288, 151_936)
TINY = Sizes(64, 2, 4, 2, 16, 128, 512)


@dataclass(frozen=True)
class Run:
    """A decoding: a cache policy with settings, blocks and tokens per step; `compiled`, the trunk is."""

    cache: str
    cache_args: tuple[tuple[str, int], ...] = ()
    block: int = 32
    per_step: int = 4
    schedule: str = "low_confidence"
    compiled: bool = False

    @property
    def label(self) -> str:
        settings = [f"{name} {value}" for name, value in self.cache_args]
        return ", ".join([self.cache, *settings, *(["compiled"] if self.compiled else [])])


FULL = [
    Run("dual"),
    Run("none"),
    Run("prefix"),
    Run("dual", (("refresh_blocks", 2),)),
    Run("dual_masked"),
    Run("dual", compiled=True),
    Run("dual", (("refresh_blocks", 4),)),
    Run("dual_masked", (("refresh_blocks", 2),)),
    Run("prefix", (("suffix_window", 64),)),
    Run("vicinity"),
    Run("dkv_decode"),
    Run("frozen_prompt"),
    Run("delayed_prefix"),
    Run("dkv_prefill"),
    Run("dkv_greedy", schedule="random"),
]
BLOCKS = [
    Run("auto", block=4, per_step=1),
    Run("auto", block=32, per_step=4),
    Run("auto", block=8, per_step=2),
    Run("auto", block=16, per_step=4),
    Run("auto", block=4, per_step=2),
    Run("auto", block=32, per_step=1),
    Run("none", block=32, per_step=4),
]


def bound(
    sizes: Sizes, grid: Grid, cache: str, arguments: dict[str, Any], rows: int, flops: float, bandwidth: float
) -> float:
    """Seconds that a decoding of `rows` rows takes at least; the head looks at the block's masked slots."""
    seconds = 0.0
    for at, fed in zip(steps(grid), positions_fed(grid, cache, arguments), strict=True):
        keys = at.stop if grid.left_to_right else grid.columns
        attention = 4 * sizes.heads * sizes.head * sizes.layers * keys
        work = rows * (fed * (2 * sizes.linear + attention) + 2 * sizes.output * at.open)
        read = 2 * (sizes.linear + sizes.output) + rows * sizes.bytes_per_key * (keys + fed)
        seconds += max(work / flops, read / bandwidth)
    return seconds


def llada(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of LLaDA's shape, its weights drawn where they stay."""
    with torch.random.fork_rng(), device:
        return tiny_llada(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.inner,
            max_position_embeddings=4096,
            dtype=dtype,
        )


def sdar(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of SDAR's shape, likewise; its blocks are set by `with_blocks`."""
    family = FAMILIES["sdar"]
    values = {
        **family.template,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "head_dim": sizes.head,
        "intermediate_size": sizes.inner,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }
    config = family.stock_config(HubConfig(values, "benchmarks/gpu.py"))
    config.diffusion = DiffusionSpec(
        mask_token_id=2, eos_token_ids=(1,), attention="block_causal", block_length=4, grid_origin="position_zero"
    ).to_dict()
    setattr(config, RECORD, {"family": "sdar"})
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = family.model_class(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def with_blocks(model: Any, run: Run) -> Any:
    """The model, its attention blocks those of the run."""
    if model.config.diffusion["attention"] != "full":
        model.config.diffusion["block_length"] = run.block
    return model


class Clock:
    """Seconds since the start, and work of a device that is done when it is read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, time.perf_counter()

    def read(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start


def measured(name: str, model: Any, sizes: Sizes, runs: Sequence[Run], options: Any, clock: Clock) -> list[Any]:
    """Every run that there is time for."""
    rows, prompt, canvas = options.rows, options.prompt, options.canvas
    prompts = [[7 + (31 * row + i) % 200 for i in range(prompt)] for row in range(rows)]
    results = []
    for run in runs:
        backend = ("eager" if options.tiny else "inductor") if run.compiled else None
        engine = RolloutEngine(with_blocks(model, run), compile=backend)
        grid = Grid(prompt, canvas, run.block, run.per_step, engine.spec.attention != "full")
        cache = "dual" if run.cache == "auto" else run.cache
        least = bound(sizes, grid, cache, dict(run.cache_args), rows, options.flops, options.bandwidth)
        result: dict[str, Any] = {
            "model": name,
            "policy": run.label,
            "block": run.block,
            "tokens_per_step": run.per_step,
            "bound_tokens_per_second": rows * canvas / least,
        }
        results.append(result)
        if clock.read() + 2.5 * least + (COMPILING if run.compiled else 5) > options.seconds:
            result["left_out"] = True
            continue
        settings = {"block_length": run.block, "temperature": 0.9, "stop_at_eos": False, "record": ()}
        settings |= {"cache": run.cache, "cache_args": dict(run.cache_args), "schedule": run.schedule}
        config = DecodingConfig(canvas_length=canvas, steps=grid.steps, **settings)
        short = DecodingConfig(canvas_length=2 * run.block, steps=4, **settings)
        engine.generate(prompts, config if run.compiled else short)  # a first time, not counted; all shapes, to compile
        if options.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with forwards(model.base_model) as fed:
            started = clock.read()
            engine.generate(prompts, config)
            seconds = clock.read() - started
        positions = sum(number * columns for number, columns in fed)
        result |= {
            "seconds": round(seconds, 3),
            "tokens_per_second": rows * canvas / seconds,
            "share_of_bound": least / seconds,
            "forwards": len(fed),
            "positions_per_slot": positions / (rows * canvas),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device.type == "cuda" else None,
        }
        print(json.dumps(result), flush=True)
    return results


@torch.no_grad()
def agreement(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """How often bfloat16 and float32 name the same most probable token, at the masked slots of a smaller model.

    Random weights leave many tokens nearly equal; `clear` are the slots where the first is ahead of the second by ten
    times the mean difference between the logits of the two.
    """
    exact = llada(sizes, device, torch.float32)
    rounded = copy.deepcopy(exact)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, sizes.vocabulary, (8, 128), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.5
    ids, masked = ids.masked_fill(masked, 2).to(device), masked.to(device)
    logits = [model(input_ids=ids).logits[masked].float() for model in (exact, rounded)]
    error = (logits[0] - logits[1]).abs().mean()
    best = logits[0].topk(2).values
    clear, same = best[:, 0] - best[:, 1] >= 10 * error, logits[0].argmax(-1) == logits[1].argmax(-1)
    return {
        "slots": len(same),
        "agreement": same.double().mean().item(),
        "clear": clear.double().mean().item(),
        "agreement_where_clear": same[clear].double().mean().item(),
        "mean_difference_of_logits": error.item(),
    }


def in_words(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| model | policy | b | k | tokens/s | bound | share | positions fed per slot | peak GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in report["runs"]:
        cells = [run["model"], run["policy"], run["block"], run["tokens_per_step"]]
        if "left_out" in run:
            cells += ["no time", f"{run['bound_tokens_per_second']:,.0f}", "", "", ""]
        else:
            peak = "" if run["peak_gib"] is None else f"{run['peak_gib']:.1f}"
            cells += [f"{run['tokens_per_second']:,.0f}", f"{run['bound_tokens_per_second']:,.0f}"]
            cells += [f"{run['share_of_bound']:.0%}", f"{run['positions_per_slot']:.1f}", peak]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    same, settings = report["bfloat16"], report["settings"]
    lines += [
        "",
        f"B={settings['rows']}, P={settings['prompt']}, L={settings['canvas']}, T=0.9, bfloat16, random weights. "
        f"Bound: {settings['flops'] / 1e12:.0f} TFLOP/s and {settings['bandwidth'] / 1e12:.1f} TB/s. The most probable "
        f"token in bfloat16 is that of float32 at {same['agreement']:.2%} of {same['slots']} masked slots of a smaller "
        f"model, and at {same['agreement_where_clear']:.2%} of the {same['clear']:.0%} where it is clear.",
        "",
        f"Measured on {', '.join(report['machine']['gpus']) or report['machine']['cpu']}; `{report['command']}`, "
        f"{report['seconds']:.0f} s.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both models and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--canvas", type=int, default=256)
    parser.add_argument("--flops", type=float, default=790e12, help="per second, dense, in bfloat16")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second")
    parser.add_argument("--seconds", type=float, default=440.0, help="no variant starts that would end later")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the same on a CPU: does it run?
    options = parser.parse_args(arguments)
    if not options.tiny:
        if not torch.cuda.is_available():
            sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none here: nothing was measured")
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        if gib < NEEDED_GIB:
            sys.exit(f"benchmarks/gpu.py needs a GPU with {NEEDED_GIB} GiB, and this one has {gib:.0f}")
    options.device = torch.device("cpu" if options.tiny else "cuda")
    shapes = (TINY, TINY, TINY) if options.tiny else (LLADA_8B, SDAR_8B, Sizes(1024, 8, 16, 16, 64, 2816, 32_768))
    if options.tiny:
        options.rows, options.prompt, options.canvas = 2, 32, 64
    clock, dtype = Clock(options.device), torch.bfloat16
    report: dict[str, Any] = {
        "command": "python benchmarks/gpu.py" + (" --tiny" if options.tiny else ""),
        "settings": {name: getattr(options, name) for name in ("rows", "prompt", "canvas", "flops", "bandwidth")},
        "bfloat16": agreement(shapes[2], options.device),
        "runs": [],
    }
    for name, make, sizes, runs in (("SDAR-8B", sdar, shapes[1], BLOCKS), ("LLaDA-8B", llada, shapes[0], FULL)):
        model = make(sizes, options.device, dtype)
        report["runs"] += measured(name, model, sizes, runs, options, clock)
        del model
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    report |= {"seconds": clock.read(), "machine": machine(), "versions": versions()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    text = in_words(report)
    (options.output / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
