"""How much memory a divergence of whole distributions takes with gradients, beside the number of positions.

    python benchmarks/distribution_memory.py

Each case is a process of its own: a randomly initialised student and a frozen copy of it as the teacher, a batch of
canvases that are hidden as a whole, the divergence of both at every position, and a backward pass. `chunks` is what the
library does; `dense` builds both `[B, L, V]` tensors. What counts is the peak of resident memory above the loaded
models. All of torch's allocations of 64 KiB or more are given back to the system when they are freed, so that resident
memory is memory in use. The claim is that four times as many positions take less than 1.5 times the memory, whose
largest part is then the chunk of logits. Writes `benchmarks/results/distribution_memory.json` and `.md`; Linux only.
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
from rl4dlm.likelihood.scoring import reduce_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models import scoring
from rl4dlm.models.distributions import Divergence, HiddenStates, divergence
from rl4dlm.models.scoring import logits_of
from rl4dlm.models.spec import DiffusionSpec

RESULTS = Path(__file__).resolve().parent / "results"
CASES = (("chunks", 256), ("chunks", 1024), ("dense", 256), ("dense", 1024))  # and positions
VOCABULARY, CHUNK, CANVAS = 32000, 64, 64


def main() -> None:
    """Measures every case `--repeats` times and writes the smallest peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(peak(*options.case)))
        return
    found = {case: [in_process(*case) for _ in range(options.repeats)] for case in CASES}
    least = {case: min(run["mib"] for run in runs) for case, runs in found.items()}
    report = {
        "command": "python benchmarks/distribution_memory.py",
        "sizes": {"vocabulary": VOCABULARY, "chunk_positions": CHUNK, "canvas": CANVAS},
        "chunk_mib": round(CHUNK * VOCABULARY * 4 / 2**20, 1),
        "ratio": round(least["chunks", 1024] / least["chunks", 256], 2),
        "ratio_dense": round(least["dense", 1024] / least["dense", 256], 2),
        "claim": 1.5,
        "cases": [{"how": how, "positions": n, "runs": found[how, n]} for how, n in CASES],
        "machine": machine(),
        "versions": versions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "distribution_memory.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.output / "distribution_memory.md").write_text(text)
    print(text)
    assert report["ratio"] <= report["claim"], report["ratio"]


def in_process(how: str, positions: int) -> dict[str, float]:
    """`peak` in a process of its own, which gives freed memory back."""
    command = [sys.executable, __file__, "--case", json.dumps([how, positions])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return result


def peak(how: str, positions: int) -> dict[str, float]:
    """MiB above the loaded models, and seconds, of both passes."""
    scoring.CHUNK_ELEMENTS = CHUNK * VOCABULARY
    student, teacher = (attach_scoring(tiny_llada(vocab_size=VOCABULARY, seed=seed)).train() for seed in (0, 1))
    spec = DiffusionSpec.of(student)

    def step(rows: int) -> None:
        ids = torch.randint(10, VOCABULARY, (rows, CANVAS + 2), generator=torch.Generator().manual_seed(0))
        keys, hidden = torch.ones_like(ids).bool(), torch.zeros(rows, 1, CANVAS + 2, dtype=torch.bool)
        hidden[..., 2:] = True
        views = Views(hidden, hidden[..., 2:].float())
        if how == "dense":
            noised = views.apply(ids, spec.mask_token_id)[:, 0]
            with torch.no_grad():
                told = teacher(input_ids=noised, attention_mask=keys.long()).logits[:, 2:].log_softmax(-1)
            own = student(input_ids=noised, attention_mask=keys.long()).logits[:, 2:].log_softmax(-1)
            divergence(own, told, "reverse_kl").sum().backward()
        else:
            with torch.no_grad():
                (states,) = reduce_views(teacher, spec, ids, keys, views, HiddenStates())
            reduction = Divergence(states, lambda h: logits_of(teacher, h), "reverse_kl")
            reduce_views(student, spec, ids, keys, views, reduction)[0].sum().backward()

    step(1)  # what torch loads on first use, and gradients, are no memory of the step
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    loaded = resident("VmRSS")
    started = time.perf_counter()
    step(positions // CANVAS)
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
        f"Peak resident memory above the loaded models of a divergence of distributions and its gradient ({sizes}; "
        f"a chunk of logits is {report['chunk_mib']} MiB); each case in its own process, the smallest of its runs.",
        "",
        "| how | positions | MiB | seconds |",
        "|---|---:|---:|---:|",
    ]
    for case in report["cases"]:
        mib, seconds = (min(run[key] for run in case["runs"]) for key in ("mib", "seconds"))
        lines.append(f"| {case['how']} | {case['positions']} | {mib:.1f} | {seconds:.2f} |")
    about = report["machine"]
    lines += [
        "",
        f"Measured on {about['cpu']}; `{report['command']}`. Claimed: four times as many positions take at most",
    ]
    lines[-1] += f" {report['claim']} times the memory."
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
