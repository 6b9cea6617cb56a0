"""How long decoding takes, as ratios within one run: caches, and the vocabulary head at masked positions only.

    python benchmarks/rollout.py

Decodes the same prompts with a randomly initialised model, several times each in turn, and writes the medians and their
ratios to `benchmarks/results/rollout.json`. Absolute times are this machine's; only the ratios mean anything elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rl4dlm import DecodingConfig, RolloutEngine, tiny_llada
from rl4dlm.evaluation import machine, versions

RESULTS = Path(__file__).resolve().parent / "results" / "rollout.json"


def main() -> None:
    """Times every variant, round-robin so that a slow moment of the machine falls on all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--canvas", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = tiny_llada(vocab_size=options.vocabulary, hidden_size=256, num_hidden_layers=6, num_attention_heads=8)
    engine = RolloutEngine(model)
    prompts = [[7 + (i + j) % 100 for j in range(options.prompt)] for i in range(options.rows)]
    common = {"canvas_length": options.canvas, "block_length": options.block, "stop_at_eos": False}
    variants: dict[str, Callable[[], object]] = {
        f"cache={cache}, {options.canvas // steps} tokens per step": lambda cache=cache, steps=steps: engine.generate(
            prompts, DecodingConfig(**common, steps=steps, cache=cache)
        )
        for steps in (options.canvas, options.canvas // 4)
        for cache in ("none", "prefix")
    }
    ids = torch.full((options.rows, options.prompt + options.canvas), 7)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, options.prompt : options.prompt + options.block] = True

    @torch.no_grad()
    def head_at_masked() -> object:
        return model(input_ids=ids, score_positions=masked, score_targets=ids)

    @torch.no_grad()
    def head_everywhere() -> object:
        return model(input_ids=ids).logits.log_softmax(-1)

    variants |= {"head everywhere": head_everywhere, "head at a block's masked positions": head_at_masked}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    names = list(medians)
    ratios = {f"{a} / {b}": round(medians[a] / medians[b], 2) for a, b in zip(names[::2], names[1::2], strict=True)}
    report = {
        "command": "python benchmarks/rollout.py",
        "settings": vars(options),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratios": ratios,
        "machine": machine(),
        "versions": versions(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["ratios"], indent=2))


if __name__ == "__main__":
    main()
