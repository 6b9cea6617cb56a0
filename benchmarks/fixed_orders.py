"""What the proving ground's start models solve in orders, and in blocks, that nobody has learnt, greedy.

    python benchmarks/fixed_orders.py                     # into benchmarks/results/fixed_orders.json
    python benchmarks/fixed_orders.py --tasks few_clue_sudoku

It is what learned orders, and learned lengths of blocks, are held against: the best of them, not only the confident
one, and thresholds in blocks of other lengths than the task's. Minutes per task on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarks.proving_ground.measuring import decoding  # noqa: E402
from benchmarks.proving_ground.settings import SPEEDS, TASKS, Run  # noqa: E402
from rl4dlm import DecodingConfig, load_denoiser, load_task  # noqa: E402
from rl4dlm.evaluation import evaluate  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fixed_orders.json"
ORDERS = ("low_confidence", "dream_entropy", "dream_topk_margin", "pc_sampler", "random", "left_to_right")
"""Schedules that write an even number of tokens at each step."""

SURE = (0.7, 0.8, 0.9)
"""Thresholds of the confidence that is written at once."""


def in_blocks(task: str) -> dict[str, list[float]]:
    """Forwards and share of the test rows solved, by threshold and length of the blocks, from the task's on."""
    run = Run(task, "full", "before")
    model, tokenizer = load_denoiser(run.checkpoint).eval(), AutoTokenizer.from_pretrained(run.checkpoint)
    canvas, lengths = run.ground.canvas, [run.ground.block]
    while 2 * lengths[-1] <= canvas:
        lengths.append(2 * lengths[-1])
    decodings: dict[Any, Any] = {
        f"{sure} sure in blocks of {length}": DecodingConfig(
            canvas_length=canvas, block_length=length, schedule="threshold", schedule_args={"threshold": sure}
        )
        for length in lengths
        for sure in SURE
    }
    rows = load_task(task, **run.ground.arguments)
    result = evaluate(model, tokenizer, rows, decodings=decodings, split="test", limit=run.scale.test)
    return {str(name): [round(m.nfe, 2), round(m.solve_rate, 4)] for name, m in result.measurements.items()}


def measured(task: str) -> dict[str, dict[str, float]]:
    """Share of the test rows that is solved, by schedule and tokens per step."""
    run = Run(task, "full", "before")
    model, tokenizer = load_denoiser(run.checkpoint).eval(), AutoTokenizer.from_pretrained(run.checkpoint)
    decodings: dict[Any, Any] = {
        f"{order} {speed}": replace(decoding(run, speed), schedule=order)
        for order in ORDERS
        for speed in SPEEDS
        if speed <= run.ground.block
    }
    rows = load_task(task, **run.ground.arguments)
    result = evaluate(model, tokenizer, rows, decodings=decodings, split="test", limit=run.scale.test)
    found: dict[str, dict[str, float]] = {order: {} for order in ORDERS}
    for name, rate in result.solve_rates.items():
        order, _, speed = str(name).partition(" ")
        found[order][speed] = round(rate, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for task in arguments.tasks:
        known[task] = measured(task)
        known[f"{task}, blocks"] = in_blocks(task)
        RESULT.write_text(json.dumps(known, indent=1) + "\n")
        for name, (forwards, rate) in known[f"{task}, blocks"].items():
            print(task, name, f"{rate:.3f} with {forwards:.2f} forwards", flush=True)
        for order, rates in known[task].items():
            print(task, order, *(f"{speed}: {rate:.3f}" for speed, rate in rates.items()), flush=True)


if __name__ == "__main__":
    main()
