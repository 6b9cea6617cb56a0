"""What a rollout costs: cache policies, schedules and a plain reference loop, in turns in one process.

    python benchmarks/rollout.py --suite ratios

A suite writes `benchmarks/results/rollout_NAME.json` and `.md`, `growth` also a plot:

- `ratios`: what the library promises of caches, as ratios of CPU time and as counts, each with the bound it must meet;
- `policies`: every cache policy on one shape: speed, positions fed against their formula, waits for the host, memory
  alive; and on a trained model how far each is from decoding without a cache;
- `schedules`: fixed, threshold and factor schedules, with and without caches, and block models with their exact cache;
- `growth`: speed against canvas length, batch, vocabulary and model size;
- `queue`: forwards of rows that end at different lengths, with and without a queue;
- `draw`: `benchmarks/draw.py`;
- `all`: all of them.

Times are CPU seconds of the process, on one thread, in interleaved rounds, so that a slow moment of the machine falls
on all variants; they are this machine's, and only their ratios mean anything elsewhere. Models are random but for the
trained one, which is the demo's. `--quick` runs everything in seconds at sizes that say nothing, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu  # noqa: E402
from benchmarks.counting import Alive, costs, forwards  # noqa: E402
from benchmarks.positions import FORMULAS, Grid, positions_fed  # noqa: E402
from rl4dlm import DecodingConfig, RolloutEngine, attach_scoring, load_denoiser, tiny_llada  # noqa: E402
from rl4dlm.evaluation import machine, versions  # noqa: E402
from rl4dlm.rollout.audit import audit  # noqa: E402
from rl4dlm.rollout.rollout import Rollout  # noqa: E402

MASK, EOS, PLAIN, ROUNDS = 2, 1, "plain loop", 3
SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "3.5M": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 640},
    "14M": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
    "33M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1360},
}
"""About so many parameters with vocabularies of 1,024, 4,096 and 8,192 tokens."""


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model, and rows that are decoded at `per_step` tokens a step.

    Args:
        size: one of `SIZES`. vocabulary: V. rows: B. prompt: P. canvas: L. block: b. per_step: k.
        attention: of the model; where it has blocks they are of b tokens, counted from the canvas on.
        spread: standard deviation of the weights; large ones make a random model's slots differ.
        peaked: factor on the head's weights; large ones make it sure of what it says.
    """

    size: str = "14M"
    vocabulary: int = 4096
    rows: int = 1
    prompt: int = 256
    canvas: int = 256
    block: int = 32
    per_step: int = 4
    attention: str = "full"
    spread: float = 0.02
    peaked: float = 1.0

    @property
    def grid(self) -> Grid:
        return Grid(self.prompt, self.canvas, self.block, self.per_step, self.attention != "full")

    @property
    def prompts(self) -> list[list[int]]:
        return [[7 + (31 * row + i) % 100 for i in range(self.prompt)] for row in range(self.rows)]

    def quick(self) -> Shape:
        """As small as it can be."""
        block = min(self.block, 8)
        return replace(
            self,
            size="tiny",
            vocabulary=256,
            rows=2,
            prompt=16,
            canvas=16,
            block=block,
            per_step=min(self.per_step, block // 2),
        )

    def config(self, variant: Variant) -> DecodingConfig:
        settings: dict[str, Any] = {
            "canvas_length": self.canvas,
            "block_length": self.block,
            "temperature": 0.9,
            "stop_at_eos": False,
            "cache": variant.cache,
            "cache_args": variant.cache_args,
            "schedule": variant.schedule,
        }
        if "steps" not in variant.more and variant.schedule in ("low_confidence", "random"):
            settings["steps"] = self.grid.steps
        return DecodingConfig(**{**settings, **variant.more})


@dataclass(frozen=True)
class Variant:
    """A way to decode.

    Args:
        label: what tables call it. cache, cache_args, schedule: as in `DecodingConfig`. more: other fields of it.
    """

    label: str
    cache: str = "none"
    cache_args: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "low_confidence"
    more: Mapping[str, Any] = field(default_factory=dict)


NONE, PREFIX, DUAL = Variant("none"), Variant("prefix", "prefix"), Variant("dual", "dual")
EVERY_SECOND = Variant("dual, refreshed every 2nd block", "dual", {"refresh_blocks": 2})
POLICIES = [
    NONE,
    PREFIX,
    Variant("prefix, 64 slots of the suffix", "prefix", {"suffix_window": 64}),
    DUAL,
    EVERY_SECOND,
    Variant("dual, refreshed every 4th block", "dual", {"refresh_blocks": 4}),
    Variant("dual_masked", "dual_masked"),
    Variant("dual_masked, refreshed every 2nd block", "dual_masked", {"refresh_blocks": 2}),
    Variant("vicinity", "vicinity"),
    Variant("frozen_prompt", "frozen_prompt"),
    Variant("delayed_prefix", "delayed_prefix"),
    Variant("dkv_decode", "dkv_decode"),
    Variant("dkv_prefill", "dkv_prefill"),
    Variant("dkv_greedy, random order", "dkv_greedy", {}, "random"),
]
"""Every policy for full attention. `sub_block` is for a schedule of block models, and measured there."""


@functools.lru_cache(maxsize=2)
def model_of(shape: Shape) -> Any:
    """The shape's model with random weights."""
    model = tiny_llada(
        vocab_size=shape.vocabulary,
        mask_token_id=MASK,
        eos_token_id=EOS,
        max_position_embeddings=max(1024, shape.grid.columns),
        initializer_range=shape.spread,
        **SIZES[shape.size],
    )
    if shape.attention != "full":
        model.config.diffusion.update(attention=shape.attention, block_length=shape.block)
    with torch.no_grad():
        model.lm_head.weight *= shape.peaked
    return attach_scoring(model)


@torch.no_grad()
def plain_loop(model: Any, shape: Shape, temperature: float, seed: int = 0) -> Tensor:
    """LLaDA's own sampler (arXiv 2502.09992), in plain words: long `[B, L]`.

    Every step feeds whole rows and computes logits everywhere. Above temperature 0 candidates are drawn by Gumbel noise
    in float64 over the whole vocabulary; a row's slots with the most probable ones are written, so many that a block's
    masks are shared out evenly over its steps.
    """
    canvas = torch.full((shape.rows, shape.canvas), MASK)
    tokens = torch.cat([torch.tensor(shape.prompts), canvas], dim=1)  # [B, T]
    generator, steps = torch.Generator().manual_seed(seed), shape.grid.steps_per_block
    for stop in range(shape.prompt + shape.block, shape.grid.columns + 1, shape.block):
        still = (tokens[:, stop - shape.block : stop] == MASK).sum(-1)  # [B]
        for step in range(steps):
            masked = tokens == MASK
            logits = model(input_ids=tokens).logits  # [B, T, V]
            if temperature > 0:
                wide = logits.double()
                noise = torch.rand(wide.shape, dtype=torch.float64, generator=generator)
                candidates = (wide.exp() / (-noise.log()) ** temperature).argmax(-1)
            else:
                candidates = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, candidates[..., None]).squeeze(-1)  # [B, T]
            confidence[:, stop:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            for row in range(shape.rows):
                count = int(still[row]) // steps + (step < int(still[row]) % steps)
                chosen = confidence[row].topk(count).indices
                tokens[row, chosen] = candidates[row, chosen]
    return tokens[:, shape.prompt :]


def runner(shape: Shape, variant: Variant | str, seed: int = 0) -> Callable[[], Tensor | Rollout]:
    """Decodes the shape's rows with a variant, or with the plain loop."""
    model = model_of(shape)
    if isinstance(variant, str):
        return lambda: plain_loop(model, shape, 0.9, seed)
    engine, config = RolloutEngine(model), shape.config(variant)
    return lambda: engine.generate(shape.prompts, config, seed=seed)


def label_of(variant: Variant | str) -> str:
    return variant if isinstance(variant, str) else variant.label


def measured(shape: Shape, variants: Sequence[Variant | str], rounds: int) -> dict[str, dict[str, Any]]:
    """Speed of variants in turns, and what they feed, by label."""
    runs = {label_of(variant): runner(shape, variant) for variant in variants}
    found: dict[str, dict[str, Any]] = {label: {"cpu_seconds": []} for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            with forwards(model_of(shape).base_model) as fed:
                started = time.process_time()
                out = run()
                found[label]["cpu_seconds"].append(round(time.process_time() - started, 4))
            canvas = out.canvas if isinstance(out, Rollout) else out
            positions = sum(rows * columns for rows, columns in fed)
            found[label] |= {
                "forwards": len(fed),
                "tokens": canvas.numel(),  # a random model's ids mean nothing: none of them is an end
                "positions_fed": positions,
                "positions_per_slot": round(positions / canvas.numel(), 3),
            }
    for variant in variants:
        result = found[label_of(variant)]
        result["seconds"] = statistics.median(result["cpu_seconds"])
        result["tokens_per_cpu_second"] = round(result["tokens"] / result["seconds"], 2)
        if isinstance(variant, Variant) and variant.schedule in ("low_confidence", "random"):
            formula = _formula(shape, variant)
            if formula is not None:
                result["positions_by_formula"] = formula
    return found


def _formula(shape: Shape, variant: Variant) -> int | None:
    """Positions that the formulas say; None where there is none."""
    cache = variant.cache
    if cache == "auto":
        cache = "prefix" if shape.grid.left_to_right else "none"
    if variant.more or cache not in FORMULAS:
        return None
    return shape.rows * sum(positions_fed(shape.grid, cache, variant.cache_args))


def ratio(found: Mapping[str, Mapping[str, Any]], slow: str, fast: str) -> dict[str, Any]:
    """How many times the CPU time of one variant is that of another: the median of the rounds, and each of them."""
    rounds = [a / b for a, b in zip(found[slow]["cpu_seconds"], found[fast]["cpu_seconds"], strict=True)]
    return {"value": round(statistics.median(rounds), 3), "rounds": [round(value, 3) for value in rounds]}


def asked(claim: str, value: float, bound: float, *, at_most: bool = False, **more: Any) -> dict[str, Any]:
    """A number, and whether it meets the bound that it must."""
    met = value <= bound if at_most else value >= bound
    return {"claim": claim, "value": value, "bound": f"{'<=' if at_most else '>='} {bound}", "met": bool(met), **more}


def shaped(options: argparse.Namespace, **settings: Any) -> Shape:
    shape = Shape(**settings)
    return shape.quick() if options.quick else shape


def about(shape: Shape) -> dict[str, Any]:
    return {**vars(shape), "parameters": sum(p.numel() for p in model_of(shape).parameters())}


# --- suites -----------------------------------------------------------------------------------------------------------


def ratios(options: argparse.Namespace) -> dict[str, Any]:
    """What is promised of caches: times against times, and counts."""
    shape = shaped(options, vocabulary=8192)
    found = measured(shape, [PLAIN, NONE, PREFIX, DUAL, EVERY_SECOND], options.rounds)
    claims = [
        _of_times("dual against none", found, "none", "dual", 2.8),
        _of_times("dual against prefix", found, "prefix", "dual", 1.4),
        _of_times("dual against the plain loop", found, PLAIN, "dual", 6.0),
        _of_times("dual refreshed every 2nd block against dual", found, "dual", EVERY_SECOND.label, 1.1),
    ]
    once = Variant("refreshed at every block", "dual", {"refresh_blocks": 1})
    canvases = [_decoded(shape, variant).canvas for variant in (DUAL, once)]
    equal = float((canvases[0] == canvases[1]).double().mean())
    claims.append(asked("equal tokens of dual and dual refreshed at every block", equal, 1.0))
    groups = {"full attention": {"shape": about(shape), "variants": found}}
    for block, rows, bound in ((32, 2, 2.9), (4, 2, None), (4, 8, 9.0)):
        name, group, more = exact_blocks(options, block, rows, bound)
        groups[name] = group
        claims += more
    claims += threshold_calls(options) + queue(options)["claims"]
    return {"claims": claims, "groups": groups}


def exact_blocks(
    options: argparse.Namespace, block: int, rows: int, bound: float | None
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """A block model with and without its exact cache: the name of the group, what was measured, what is claimed."""
    shape = shaped(
        options, rows=rows, prompt=128, canvas=128, block=block, per_step=1, attention="block_causal"
    )  # fmt: skip
    cached = Variant("exact block cache", "auto")
    found = measured(shape, [NONE, cached], options.rounds)
    where = f"b={block}, k=1, {rows} rows"
    canvases = [_decoded(shape, variant).canvas for variant in (NONE, cached)]
    equal = float((canvases[0] == canvases[1]).double().mean())
    claims = [
        _of_times(f"exact block cache against none, {where}", found, "none", cached.label, bound),
        {"claim": f"equal tokens of the exact block cache and none, {where}", "value": equal},
    ]
    return f"block model, {where}", {"shape": about(shape), "variants": found}, claims


def _of_times(
    name: str, found: Mapping[str, Mapping[str, Any]], slow: str, fast: str, bound: float | None
) -> dict[str, Any]:
    of, claim = ratio(found, slow, fast), f"{name}, CPU time"
    if bound is None:
        return {"claim": claim, **of}
    return asked(claim, of["value"], bound, rounds=of["rounds"])


def _decoded(shape: Shape, variant: Variant) -> Rollout:
    out = runner(shape, variant)()
    assert isinstance(out, Rollout)
    return out


def threshold_calls(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forwards of a threshold schedule with a cache, against the steps of the longest row and the number of blocks."""
    sizes = {"size": "tiny", "vocabulary": 256, "rows": 16, "prompt": 32, "canvas": 128, "block": 16}
    shape = shaped(options, **sizes, spread=0.4, peaked=3.0)
    claims = []
    for cache in ("prefix", "dual"):
        variant = Variant(cache, cache, {}, "threshold", {"schedule_args": {"threshold": 0.9}})
        with forwards(model_of(shape).base_model) as fed:
            longest = int(_decoded(shape, variant).trace.steps.max())
        blocks = shape.canvas // shape.block
        name = f"forwards of threshold with {cache}; longest row {longest} steps, {blocks} blocks"
        claims.append(asked(name, len(fed), longest + blocks, at_most=True))
    return claims


def queue(options: argparse.Namespace) -> dict[str, Any]:
    """Rows that end at different lengths: forwards with a queue, with one batch after another, and the ideal count."""
    places, rows = (2, 6) if options.quick else (16, 128)
    canvas, block = 48, 4
    shape = Shape("tiny", 256, rows, 16, canvas, block, 1, spread=0.4, peaked=3.0)
    model = model_of(shape)
    lengths = [(7 * row) % 40 + 4 for row in range(rows)]
    hints = [{length: EOS} for length in lengths]
    found, claims = {}, []
    for name, more in {
        "fixed, none": {"steps": canvas},
        "fixed, prefix": {"steps": canvas, "cache": "prefix"},
        "fixed, dual": {"steps": canvas, "cache": "dual"},
        "threshold, none": {"schedule": "threshold"},
        "threshold, prefix": {"schedule": "threshold", "cache": "prefix"},
    }.items():
        config = DecodingConfig(
            canvas_length=canvas, block_length=block, min_new_tokens=canvas, temperature=0.9, **more
        )
        with forwards(model.base_model) as fed:
            RolloutEngine(model, max_batch_rows=places).generate(shape.prompts, config, hints=hints)
        with forwards(model.base_model) as batched:
            for start in range(0, rows, places):
                part = slice(start, start + places)
                RolloutEngine(model).generate(shape.prompts[part], config, hints=hints[part], row_ids=range(rows)[part])
        ideal = -(-sum(number for number, _ in fed) // places)
        positions, positions_batched = (sum(r * c for r, c in seen) for seen in (fed, batched))
        found[name] = {
            "forwards": len(fed),
            "ideal": ideal,
            "in_batches": len(batched),
            "positions_fed": positions,
            "positions_in_batches": positions_batched,
        }
        if more.get("cache") != "dual":  # where rows that are refreshed and others do not share a forward
            value = round(len(fed) / ideal, 3)
            claims.append(asked(f"forwards of a queue against the ideal count, {name}", value, 1.15, at_most=True))
    return {"claims": claims, "shape": {**vars(shape), "places": places, "lengths": lengths}, "variants": found}


def policies(options: argparse.Namespace) -> dict[str, Any]:
    """Every cache policy on one shape, and how far each is from decoding without one on a trained model."""
    shape = shaped(options)
    found = measured(shape, [PLAIN, *POLICIES], options.rounds)
    small = replace(shape, size="tiny", vocabulary=256, rows=8) if not options.quick else shape
    for variant in POLICIES:
        run = runner(small, variant)
        with costs(model_of(small).base_model) as counted:
            run()
        steps = small.grid.steps
        found[variant.label] |= {
            "waits_per_step": round(counted.waits.total() / steps, 2),
            "operations_per_step": round(counted.operations.total() / steps, 1),
        }
    alive = replace(shape, canvas=min(64, shape.canvas))
    for variant in (PLAIN, *POLICIES):
        run = runner(alive, variant)
        with Alive() as held:
            run()
        found[label_of(variant)]["mib_alive"] = round(held.peak / 2**20, 2)
    return {
        "shape": about(shape),
        "shape_of_waits": about(small),
        "shape_of_memory": about(alive),
        "variants": found,
        "computed": computed(),
        "trained": trained(options),
    }


def computed() -> list[dict[str, Any]]:
    """By the formulas, not measured: positions fed per slot, and how fast LLaDA-8B can decode at most on an H200."""
    results = []
    blocks = Variant("exact block cache, attention in blocks", "prefix")
    for variant in (*POLICIES, blocks):
        result: dict[str, Any] = {"policy": variant.label}
        for per_step in (1, 2, 4):
            grid = Grid(256, 256, 32, per_step, left_to_right=variant is blocks)
            arguments = dict(variant.cache_args)
            positions = sum(positions_fed(grid, variant.cache, arguments)) / grid.canvas
            seconds = gpu.bound(gpu.LLADA_8B, grid, variant.cache, arguments, 64, 790e12, 4.3e12)
            result |= {f"positions_{per_step}": round(positions, 1), f"bound_{per_step}": round(64 * 256 / seconds)}
        results.append(result)
    return results


WINDOWS = {"vicinity": {"before": 4, "after": 4, "warmup_steps": 1}, "dkv_greedy": {"window": 2}}
"""Settings for canvases of 16 slots, on which the defaults would leave nothing out."""


def trained(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The demo's model: what policies solve, whose tokens equal those without a cache, and what an audit says."""
    from transformers import AutoTokenizer

    from benchmarks.schedules import Puzzles

    checkpoint = ROOT / "examples" / "demo_checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    engine = RolloutEngine(load_denoiser(checkpoint).eval())
    puzzles = Puzzles(4 if options.quick else 200, tokenizer)
    chosen = [v for v in POLICIES if v.cache not in ("prefix", "dual_masked") or not v.cache_args]
    chosen = chosen[:3] if options.quick else chosen
    results = []
    for block, steps in ((4, 16), (8, 8)):
        for temperature in (0.9,) if options.quick else (0.0, 0.9):
            exact: dict[str, Rollout] = {}
            for variant in [*chosen[:1], Variant("none, random order", schedule="random"), *chosen[1:]]:
                config = DecodingConfig(
                    canvas_length=16,
                    block_length=block,
                    steps=steps,
                    temperature=temperature,
                    schedule=variant.schedule,
                    cache=variant.cache,
                    cache_args={**variant.cache_args, **WINDOWS.get(variant.cache, {})},
                    stop_at_eos=False,
                )
                with forwards(engine.model.base_model) as fed:
                    rollout = engine.generate(puzzles.prompts, config)
                reference = exact.setdefault(variant.schedule, rollout)
                texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
                solved = sum(bool(verdict) for verdict in puzzles.task.check_many(texts, puzzles.rows))
                results.append(
                    {
                        "policy": variant.label,
                        "cache_args": dict(config.cache_args),
                        "block": block,
                        "tokens_per_step": 16 // steps,
                        "temperature": temperature,
                        "solved": solved / len(puzzles.rows),
                        "equal_tokens": float((rollout.canvas == reference.canvas).double().mean()),
                        "positions_per_slot": round(sum(r * c for r, c in fed) / rollout.canvas.numel(), 2),
                        "audit": audit(engine.model, rollout).summary(),
                    }
                )
    return results


def schedules(options: argparse.Namespace) -> dict[str, Any]:
    """Schedules of every class on a random model that is sure of itself, and block models with their exact cache."""
    shape = shaped(options, prompt=128, canvas=128, spread=0.1, peaked=4.0)
    named: list[tuple[str, str, dict[str, Any]]] = [
        (f"fixed, k={shape.block // steps}", "low_confidence", {"steps": steps * (shape.canvas // shape.block)})
        for steps in sorted({shape.block // k for k in (1, 2, 4)}, reverse=True)
    ]
    named += [
        ("threshold 0.9", "threshold", {"schedule_args": {"threshold": 0.9}}),
        ("factor 1", "factor", {"schedule_args": {"factor": 1.0}}),
        ("entropy_bound 0.3", "entropy_bound", {"schedule_args": {"gamma": 0.3}}),
    ]
    groups: dict[str, Any] = {}
    variants = [
        Variant(f"{name}, {cache}", cache, {}, schedule, more)
        for name, schedule, more in named
        for cache in ("none", "prefix", "dual")
    ]
    guesses = {"steps": shape.canvas, "draft_steps": 4}
    variants.insert(1, Variant("fixed, k=1, none, draft_steps 4", "none", {}, "low_confidence", guesses))
    groups["full attention"] = {"shape": about(shape), "variants": measured(shape, variants, options.rounds)}
    for block in (4, 32):
        sizes = {"rows": 2, "prompt": 128, "canvas": 128, "block": block, "per_step": 1, "attention": "block_causal"}
        blocks = shaped(options, **sizes, spread=0.1, peaked=4.0)
        count = blocks.canvas // blocks.block
        kinds: list[tuple[str, str, dict[str, Any]]] = [
            (f"fixed, k={k}", "low_confidence", {"steps": blocks.block // k * count})
            for k in (1, 4)
            if blocks.block % k == 0
        ]
        kinds += [named[-3], named[-2]]
        variants = [
            Variant(f"{name}, {cache}", cache, {}, schedule, more)
            for name, schedule, more in kinds
            for cache in ("none", "auto")
        ]
        if block == 32:
            inner = min(8, blocks.block // 2)
            sub = {"schedule_args": {"sub_block_length": inner}}
            variants += [
                Variant("sub-blocks, auto", "auto", {}, "sub_blocks", sub),
                Variant("sub-blocks, sub_block", "sub_block", {"sub_block_length": inner}, "sub_blocks", sub),
            ]
        groups[f"block model, b={block}"] = {
            "shape": about(blocks),
            "variants": measured(blocks, variants, options.rounds),
        }
    return {"groups": groups}


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Speed against one size at a time."""
    base = Shape("3.5M", 1024, 1, 64, 64, 32, 4)
    long = replace(base, prompt=128, canvas=128)
    lines: dict[str, list[tuple[float, Shape, list[Variant | str]]]] = {
        "canvas length": [
            (length, replace(base, canvas=length, per_step=8), [NONE, PREFIX, DUAL, EVERY_SECOND])
            for length in (64, 128, 256, 512, 1024)
        ],
        "rows": [(rows, replace(base, rows=rows), [PLAIN, NONE, PREFIX, DUAL]) for rows in (1, 2, 4, 8, 16, 32, 64)],
        "vocabulary": [
            (size, replace(base, vocabulary=size), [PLAIN, NONE, PREFIX, DUAL])
            for size in (2048, 8192, 32_768, 126_464)
        ],
        "million parameters": [
            (
                count,
                replace(long, size=size, vocabulary=vocabulary),
                [PLAIN, NONE, PREFIX, DUAL],
            )
            for count, size, vocabulary in ((3.5, "3.5M", 1024), (14, "14M", 4096), (33, "33M", 8192))
        ],
    }
    curves: dict[str, Any] = {}
    for name, points in lines.items():
        curves[name] = []
        for value, full, variants in points[:2] if options.quick else points:
            shape = full.quick() if options.quick else full
            found = measured(shape, variants, options.rounds)
            curves[name].append({"at": value, "shape": about(shape), "variants": found})
    return {"curves": curves}


def draw(options: argparse.Namespace) -> dict[str, Any]:
    """`benchmarks/draw.py` with its defaults."""
    from benchmarks import draw as draws

    rows, vocabulary = (4, 1024) if options.quick else (66, 126_464)
    return {"rows": rows, "vocabulary": vocabulary, "cases": draws.cases(rows, vocabulary, options.rounds)}


SUITES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ratios": ratios,
    "policies": policies,
    "schedules": schedules,
    "growth": growth,
    "queue": queue,
    "draw": draw,
}


# --- showing ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "tokens_per_cpu_second": "tokens per CPU second",
    "forwards": "forwards",
    "positions_per_slot": "positions fed per slot",
    "waits_per_step": "waits per step",
    "operations_per_step": "operations per step",
    "mib_alive": "MiB alive",
}


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Markdown; columns that no row has are left out."""
    shown = {key: title for key, title in columns.items() if any(key in row for row in rows)}
    lines = [f"| {' | '.join(shown.values())} |", "|---|" + "---:|" * (len(shown) - 1)]
    return lines + [f"| {' | '.join(_cell(row.get(key)) for key in shown)} |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def of_variants(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of what was measured; how many times faster than without a cache where that was measured."""
    rows = [{"variant": label, **result} for label, result in found.items()]
    if "none" in found:
        for row, label in zip(rows, found, strict=True):
            row["faster"] = ratio(found, "none", label)["value"]
    return table(rows, {"variant": "", "faster": "times faster than none", **COLUMNS})


def in_words(suite: str, report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines: list[str] = []
    if "claims" in report:
        lines += [*table(report["claims"], {"claim": "claim", "value": "value", "bound": "bound", "met": "met"}), ""]
    for name, group in report.get("groups", {}).items():
        lines += [f"{name}: {_shape(group['shape'])}.", "", *of_variants(group["variants"]), ""]
    if suite == "policies":
        lines += [f"{_shape(report['shape'])}.", "", *of_variants(report["variants"]), ""]
        lines += ["P=L=256, b=32, computed; tokens/s at most of LLaDA-8B on an H200, 64 rows:", ""]
        lines += [*table(report["computed"], COMPUTED), ""]
        lines += ["The demo's model, canvases of 16 slots:", "", *table(_flat(report["trained"]), TRAINED), ""]
    if suite == "queue":
        rows = [{"variant": name, **found} for name, found in report["variants"].items()]
        columns = {"variant": "", "forwards": "with a queue", "ideal": "ideal", "in_batches": "in batches"}
        columns |= {"positions_fed": "positions fed with a queue", "positions_in_batches": "in batches"}
        lines += [*table(rows, columns), ""]
    for name, points in report.get("curves", {}).items():
        labels = dict.fromkeys(label for point in points for label in point["variants"])
        rows = [
            {"at": point["at"], **{k: v["tokens_per_cpu_second"] for k, v in point["variants"].items()}}
            for point in points
        ]
        lines += ["Tokens per CPU second:", "", *table(rows, {"at": name, **{label: label for label in labels}}), ""]
    if suite == "draw":
        rows = [{"case": name, **found} for name, found in report["cases"].items()]
        lines += [*table(rows, {"case": "", "milliseconds as of 25eb81d": "ms at 25eb81d", "milliseconds": "ms now",
                                "ratio": "ratio", "equal tokens": "equal tokens"}), ""]  # fmt: skip
    where, rounds = report["machine"], report["rounds"]
    if suite == "queue":
        lines.append(f"Counted; `{report['command']}`.")
    else:
        of_rounds = "one round" if rounds == 1 else f"medians of {rounds} interleaved rounds"
        lines.append(
            f"Measured on {where['cpu']}, {where['cores']} cores, one thread, {of_rounds} of process CPU time; "
            f"`{report['command']}`."
        )
    return "\n".join([*lines, ""])


TRAINED = {
    "policy": "policy", "block": "b", "tokens_per_step": "k", "temperature": "T",
    "positions_per_slot": "positions fed per slot",
    "equal_tokens": "equal tokens", "solved": "solved", "delta": "audit: delta", "effective_share": "effective share",
}  # fmt: skip

COMPUTED = {
    "policy": "policy",
    **{f"positions_{k}": f"positions fed per slot, k={k}" for k in (1, 2, 4)},
    **{f"bound_{k}": f"tokens/s at most, k={k}" for k in (1, 2, 4)},
}


def _flat(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**result, **result["audit"]} for result in results]


def _shape(shape: Mapping[str, Any]) -> str:
    return (
        f"{shape['parameters'] / 1e6:.1f}M parameters, V={shape['vocabulary']:,}, B={shape['rows']}, "
        f"P={shape['prompt']}, L={shape['canvas']}, b={shape['block']}, k={shape['per_step']}"
    )


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Tokens per CPU second, a panel per size that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    colors: dict[str, str] = {}
    for axes, (name, points) in zip(panels.flat, report["curves"].items(), strict=True):
        for label in dict.fromkeys(label for point in points for label in point["variants"]):
            color = colors.setdefault(label, f"C{len(colors)}")
            there = [point for point in points if label in point["variants"]]
            speed = [point["variants"][label]["tokens_per_cpu_second"] for point in there]
            axes.plot([point["at"] for point in there], speed, marker="o", markersize=4, color=color, label=label)
        axes.set(xlabel=name, xscale="log", yscale="log")
        ticks = [point["at"] for point in points]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(pyplot.NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supylabel("tokens per CPU second")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a suite and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="ratios")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results; quick: outputs/rollout")
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing: a try")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is not allowed; it must be 1 or larger")
    torch.set_num_threads(1)
    output = options.output or ROOT / ("outputs/rollout" if options.quick else "benchmarks/results")
    output.mkdir(parents=True, exist_ok=True)
    for name in SUITES if options.suite == "all" else [options.suite]:
        started = time.process_time()
        load = [os.getloadavg()[0]]
        report = {
            "command": " ".join(
                [
                    f"python benchmarks/rollout.py --suite {name}",
                    *([f"--rounds {options.rounds}"] if options.rounds != ROUNDS else []),
                    *(["--quick"] if options.quick else []),
                ]
            ),
            "rounds": options.rounds,
            **copy.deepcopy(SUITES[name](options)),
            "cpu_seconds_of_the_suite": round(time.process_time() - started, 1),
            "load_of_the_machine_before_and_after": [*load, os.getloadavg()[0]],
            "machine": machine(),
            "versions": versions(),
        }
        (output / f"rollout_{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        text = in_words(name, report)
        (output / f"rollout_{name}.md").write_text(text)
        if "curves" in report:
            plot(report, output / f"rollout_{name}.png")
        print(text)


if __name__ == "__main__":
    main()
