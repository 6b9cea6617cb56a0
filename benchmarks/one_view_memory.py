"""How much memory scoring with gradients takes in one-view mode, for 8 views beside 1.

    python benchmarks/one_view_memory.py

Each case is a process of its own: it loads a randomly initialised model, scores a batch of rows with K views that hide
half of the tokens each, and goes backward. What counts is the peak of resident memory above that of the loaded model,
gradients included. All of torch's allocations of 64 KiB or more are given back to the system when they are freed
(`MALLOC_MMAP_THRESHOLD_`), so that resident memory is memory in use. The claim is that 8 views in one-view mode take at
most 1.25 times as much as 1. Writes `benchmarks/results/one_view_memory.json` and `.md`; works on Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rl4dlm import attach_scoring, tiny_llada
from rl4dlm.evaluation import machine, versions
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.spec import DiffusionSpec

RESULTS = Path(__file__).resolve().parent / "results"
CASES = ((1, True), (8, True), (8, False))  # views, one_view
SIZES = {"rows": 4, "prompt": 64, "canvas": 192, "vocabulary": 8000, "hidden": 128, "layers": 6}


def main() -> None:
    """Measures every case `--repeats` times and writes the smallest peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # (views, one_view) of this process
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    if options.case is not None:
        print(json.dumps(peak(*options.case, **sizes)))
        return
    found = {case: [in_process(*case, **sizes) for _ in range(options.repeats)] for case in CASES}
    one, turns, together = (min(each["mib"] for each in found[case]) for case in CASES)
    report = {
        "command": "python benchmarks/one_view_memory.py",
        "sizes": sizes,
        "ratio": round(turns / one, 3),
        "ratio_without_one_view": round(together / one, 3),
        "claim": 1.25,
        "cases": [{"views": k, "one_view": mode, "runs": found[k, mode]} for k, mode in CASES],
        "machine": machine(),
        "versions": versions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "one_view_memory.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.output / "one_view_memory.md").write_text(text)
    print(text)
    assert report["ratio"] <= report["claim"], report["ratio"]


def in_process(views: int, one_view: bool, **sizes: int) -> dict[str, float]:
    """`peak` in a process of its own, which gives freed memory back."""
    command = [sys.executable, __file__, "--case", json.dumps([views, one_view])]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return result


def peak(
    views: int, one_view: bool, rows: int, prompt: int, canvas: int, vocabulary: int, hidden: int, layers: int
) -> dict[str, float]:
    """MiB above the loaded model, and seconds, of a backward pass through the scores of K views."""
    model = attach_scoring(
        tiny_llada(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4)
    ).train()

    def step(rows: int, prompt: int, canvas: int) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, vocabulary, (rows, prompt + canvas), generator=generator)
        whole = torch.ones_like(ids).bool()
        batch = Rows(ids[:, :prompt], whole[:, :prompt], ids[:, prompt:], whole[:, prompt:], torch.arange(rows))
        half = torch.rand(rows, views, canvas, generator=generator).argsort(-1) < canvas // 2
        estimator = ELBO(views, "count")
        drawn = estimator.views(batch, half, torch.full((rows, views), 0.5))
        scored = score_views(model, DiffusionSpec.of(model), batch.ids, batch.attention_mask, drawn, one_view=one_view)
        estimator.reduce(scored.log_probs, drawn).sum(-1).exp().sum().backward()
        model.zero_grad()

    step(1, 2, 4)  # what torch loads on first use is no memory of the step
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    loaded = resident("VmRSS")
    started = time.perf_counter()
    step(rows, prompt, canvas)
    seconds = time.perf_counter() - started
    return {"mib": round(resident("VmHWM") - loaded, 1), "loaded_mib": round(loaded, 1), "seconds": round(seconds, 2)}


def resident(which: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    sizes = ", ".join(f"{name} {value}" for name, value in report["sizes"].items())
    lines = [
        f"Peak resident memory above the loaded model of a forward and a backward pass ({sizes}); each case in its own "
        "process, the smallest of its runs.",
        "",
        "| views | one view at a time | MiB | times 1 view | seconds |",
        "|---:|---|---:|---:|---:|",
    ]
    first = min(run["mib"] for run in report["cases"][0]["runs"])
    for case in report["cases"]:
        mib, seconds = (min(run[key] for run in case["runs"]) for key in ("mib", "seconds"))
        mode = "yes" if case["one_view"] else "no"
        lines.append(f"| {case['views']} | {mode} | {mib:.1f} | {mib / first:.2f} | {seconds:.2f} |")
    about = report["machine"]
    lines += ["", f"Measured on {about['cpu']}; `{report['command']}`. Claimed: at most {report['claim']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
