"""How much the demo gains, over seeds, beside two controls; writes the figures and the picture that the README shows.

Runs `examples/demo.py` once per seed and method: diffu-GRPO with the right reward, supervised fine-tuning that goes on
for as long as that took, and diffu-GRPO with random rewards.

    python benchmarks/demo_seeds.py

writes `benchmarks/results/demo_seeds.json`, `demo_seeds.md` and `docs/images/demo.png`. Seeds vary training alone: all
runs start from the same checkpoint and are measured on the same test puzzles, greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"rl": "diffu-GRPO", "sft": "SFT for the same time", "random-reward": "random rewards"}


def main() -> None:
    """Runs what has no result yet, then summarises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "demo_seeds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:

        def start(method: str, seed: int, seconds: float | None = None) -> Future[dict[str, Any]]:
            return pool.submit(run, method, seed, options.work / f"{method}-{seed}", seconds)

        rl = [start("rl", seed) for seed in options.seeds]
        random = [start("random-reward", seed) for seed in options.control_seeds]
        runs["rl"] = [future.result() for future in rl]
        seconds = sum(r["training_seconds"] for r in runs["rl"]) / len(rl)
        sft = [start("sft", seed, seconds) for seed in options.control_seeds]
        runs["sft"] = [future.result() for future in sft]
        runs["random-reward"] = [future.result() for future in random]
    options.output.mkdir(parents=True, exist_ok=True)
    kept = ("before", "after", "training_seconds", "learning_curve", "seeds", "settings")
    first = runs["rl"][0]
    summary = {
        "command": "python benchmarks/demo_seeds.py",
        "trained_with_steps": first["trained_with_steps"],
        "test_puzzles": first["settings"]["puzzles"],
        "machine": first["machine"],
        "versions": first["versions"],
        "runs": {method: [{key: r[key] for key in kept} for r in results] for method, results in runs.items()},
    }
    for run_of in (r for results in summary["runs"].values() for r in results):
        del run_of["settings"]["output"]  # a folder of this machine
    (options.output / "demo_seeds.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = table(runs)
    (options.output / "demo_seeds.md").write_text(text)
    plot(runs, ROOT / "docs" / "images" / "demo.png")
    print(text)


def run(method: str, seed: int, output: Path, seconds: float | None) -> dict[str, Any]:
    """The results of one demo run, made now if they are not there."""
    if not (output / "results.json").is_file():
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--train", method, "--seed", str(seed)]
        command += ["--output", str(output), *(["--seconds", str(seconds)] if seconds is not None else [])]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((output / "results.json").read_text())


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Solve rates by method and number of steps: the mean over seeds and their range."""
    first = runs["rl"][0]
    steps = list(first["before"])
    lines = [
        f"Share of {first['settings']['puzzles']} test puzzles solved, by number of denoising steps; after training: "
        f"mean [lowest, highest] over seeds {[r['seeds']['training'] for r in runs['rl']]}; controls: seeds "
        f"{[r['seeds']['training'] for r in runs['sft']]}.",
        "",
        "| | " + " | ".join(f"{s} steps" for s in steps) + " | training |",
        "|---|" + "---:|" * (len(steps) + 1),
        "| before | " + " | ".join(f"{first['before'][s]:.3f}" for s in steps) + " | |",
    ]
    for method, results in runs.items():
        cells = []
        for s in steps:
            rates = [r["after"][s] for r in results]
            cells.append(
                f"{sum(rates) / len(rates):.3f}" + (f" [{min(rates):.3f}, {max(rates):.3f}]" if len(rates) > 1 else "")
            )
        seconds = [r["training_seconds"] for r in results]
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + f" | {sum(seconds) / len(seconds):.0f} s |")
    trained = str(first["trained_with_steps"])
    gains = [100 * (r["after"][trained] - r["before"][trained]) for r in runs["rl"]]
    lines += [
        "",
        f"Gain of diffu-GRPO at {trained} steps, by seed: " + ", ".join(f"{g:+.1f}" for g in gains) + " points.",
        "",
    ]
    return "\n".join(lines)


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left: solve rate against forwards, before and after. Right: the learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = runs["rl"][0]
    steps = [int(s) for s in first["before"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    left.plot(steps, list(first["before"].values()), color="0.35", marker="o", label="before")
    colors = {"rl": "tab:blue", "sft": "tab:orange", "random-reward": "tab:red"}
    for method, results in runs.items():
        rates = [[r["after"][str(s)] for r in results] for s in steps]
        mean = [sum(r) / len(r) for r in rates]
        style = "-" if method == "rl" else "--"
        left.plot(steps, mean, color=colors[method], marker="o", linestyle=style, label=f"after {METHODS[method]}")
        left.fill_between(steps, [min(r) for r in rates], [max(r) for r in rates], color=colors[method], alpha=0.15)
    left.set(xscale="log", xlabel="forwards per puzzle (NFE)", ylabel="puzzles solved", ylim=(0, 1.02))
    left.set_xticks(steps, [str(s) for s in steps])
    left.minorticks_off()
    left.legend(fontsize="small")
    for result in runs["rl"]:
        curve = result["learning_curve"]
        right.plot(
            curve["steps"], curve["solved"], color="tab:blue", alpha=0.7, label=f"seed {result['seeds']['training']}"
        )
    right.set(xlabel="optimizer steps", ylabel=f"solved in {first['trained_with_steps']} forwards", ylim=(0, 1.02))
    right.set_title("diffu-GRPO, validation puzzles", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
