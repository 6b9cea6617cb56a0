"""What a training step of the demo costs and where its time goes, before and after a change of the library.

    python benchmarks/training_step.py --before 79ef539

Runs the first steps of `examples/demo.py`'s training from this tree and from a commit before it, which is taken out of
git into a temporary folder: two processes with one thread each, which take one step in turn, measured in CPU seconds of
each behind the first two steps. Then a few steps of both in float64, whose losses must be equal to 1e-6.

glibc's allocator learns from what is freed: after large activations have been, it keeps memory of that size for later
instead of getting it from the system anew, page by page. A step that has none would be charged for that, in its
rollout, and so both processes are told to keep what they free. One more pair runs as the allocator comes. Writes
`benchmarks/results/training_step.json` and `.md`; takes about three minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "rollout": "rollout",
    "_calculate_rewards": "rewards",
    "_score_fixed_policies": "old and reference scores",
    "_compute_loss": "scores and loss",
    "backward": "backward",
}
"""Methods of a trainer, or of its accelerator, and the part of a step that they are."""
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
WARM_UP = 2
READY, RESULT = "ready for a step", "result: "
TOLERANCE = 1e-6


def main() -> None:
    """Measures both trees in turns, compares their losses, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="79ef539", help="commit to compare with")
    parser.add_argument("--steps", type=int, default=14, help="of a run, with two that are not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--run", nargs=2, metavar=("TREE", "DTYPE"), help=argparse.SUPPRESS)  # this process's
    options = parser.parse_args()
    if options.run:
        print(RESULT + json.dumps(measured(Path(options.run[0]), options.run[1], options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", options.before], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        trees = {"before": Path(folder), "after": ROOT}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, found in in_turns(trees, "float32", options.steps).items():
                runs[name].append(found)
        as_it_comes = in_turns(trees, "float32", options.steps, allocator={})
        exact = {name: found["losses"] for name, found in in_turns(trees, "float64", 6).items()}
    write(options, runs, as_it_comes, exact)


def write(
    options: argparse.Namespace,
    runs: Mapping[str, list[dict[str, Any]]],
    as_it_comes: Mapping[str, dict[str, Any]],
    exact: dict[str, list[float]],
) -> None:
    """Writes the measurements of both trees, and how far their losses are apart."""
    from rl4dlm.evaluation import machine, versions

    apart = max(abs(a - b) for a, b in zip(exact["before"], exact["after"], strict=True))
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    ratios = [a / b for a, b in zip(seconds["before"], seconds["after"], strict=True)]
    report = {
        "command": f"python benchmarks/training_step.py --before {options.before}",
        "before": options.before,
        "steps": options.steps - WARM_UP,
        "cpu_seconds_per_step": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "parts": {
            name: {part: statistics.median(run["parts"][part] for run in found) for part in found[0]["parts"]}
            for name, found in runs.items()
        },
        "allocator_as_it_comes": {
            "ratio": as_it_comes["before"]["seconds"] / as_it_comes["after"]["seconds"],
            "parts": {name: found["parts"] for name, found in as_it_comes.items()},
        },
        "losses_in_float64": exact,
        "largest_difference_of_losses": apart,
        "machine": machine(),
        "versions": versions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training_step.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.output / "training_step.md").write_text(text)
    print(text)
    assert apart <= TOLERANCE, f"losses in float64 differ by {apart}"


def in_turns(
    trees: Mapping[str, Path], dtype: str, steps: int, allocator: Mapping[str, str] = KEEP
) -> dict[str, dict[str, Any]]:
    """`measured` with the library of each tree, in processes of their own of which one at a time makes a step."""
    processes = {}
    for name, tree in trees.items():
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= allocator
        command = [sys.executable, __file__, "--run", str(tree), dtype, "--steps", str(steps)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes[name] = subprocess.Popen(command, env=environment, text=True, **pipes)
    for process in processes.values():  # wait until both have been loaded
        until(process, READY)
    for _ in range(steps):
        for process in processes.values():
            process.stdin.write("\n")
            process.stdin.flush()
            until(process, READY)
    found = {name: json.loads(until(process, RESULT)) for name, process in processes.items()}
    for process in processes.values():
        process.communicate()
    return found


def until(process: Any, mark: str) -> str:
    """What follows a mark in a line of a process's output, once it is there."""
    for line in process.stdout:
        if line.startswith(mark):
            return line.removeprefix(mark)
    raise RuntimeError(f"{process.args} ended with status {process.wait()} before it was done")


def measured(tree: Path, dtype: str, steps: int) -> dict[str, Any]:
    """CPU seconds per step of the demo's training, by part, and its losses."""
    sys.path.insert(0, str(tree / "examples"))
    import demo
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    import rl4dlm

    assert Path(rl4dlm.__file__).is_relative_to(tree), f"{rl4dlm.__file__} is not the library of {tree}"

    class Clock(TrainerCallback):
        started = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                spent.clear()
                self.started = time.process_time()
            control.should_training_stop = state.global_step == steps
            if control.should_training_stop:
                print(READY, flush=True)
            else:
                self.wait()

        def wait(self) -> None:
            print(READY, flush=True)
            sys.stdin.readline()

    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(output=Path(folder), seed=0, train="rl", max_steps=150, seconds=None)
        model = rl4dlm.load_denoiser(demo.CHECKPOINT, dtype=getattr(torch, dtype))
        clock, spent = Clock(), defaultdict[str, float](float)
        trainer: Any = demo.build_trainer(settings, model, AutoTokenizer.from_pretrained(demo.CHECKPOINT), clock)
        trainer.args.logging_steps, trainer.args.disable_tqdm = 1, True
        trainer.state.logging_steps = 1
        for name, part in PARTS.items():
            owner = trainer.accelerator if name == "backward" else trainer
            setattr(owner, name, timed(getattr(owner, name), spent, part))
        losses: list[float] = []
        compute = trainer._compute_loss

        def kept(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            losses.append(loss.item())
            return loss

        trainer._compute_loss = kept
        trainer.train()
    total = (time.process_time() - clock.started) / (steps - WARM_UP)
    parts = {part: spent[part] / (steps - WARM_UP) for part in PARTS.values()}
    parts["other"] = total - sum(parts.values())
    return {"seconds": total, "parts": parts, "losses": losses}


def timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """The function, which adds its CPU seconds to a part."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.process_time() - started

    return wrapper


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    before, after = report["parts"]["before"], report["parts"]["after"]
    lines = [
        f"A step of the demo's training in CPU seconds of the process, one thread: {report['steps']} steps a run, in "
        f"turns with the other tree; median of {len(report['ratios'])} runs each. Before: commit {report['before']}.",
        "",
        "| part | before | share | after | share |",
        "|---|---:|---:|---:|---:|",
    ]
    totals = [sum(parts.values()) for parts in (before, after)]
    for part in before:
        lines.append(
            f"| {part} | {before[part]:.3f} | {before[part] / totals[0]:.0%} | {after[part]:.3f} "
            f"| {after[part] / totals[1]:.0%} |"
        )
    lines += [
        f"| step | {totals[0]:.3f} | | {totals[1]:.3f} | |",
        "",
        f"Before over after: {report['ratio']:.2f} ({', '.join(f'{r:.2f}' for r in report['ratios'])}), where freed "
        f"memory is kept; {report['allocator_as_it_comes']['ratio']:.2f} with the allocator as it comes. Losses of the "
        f"first steps in float64 differ by {report['largest_difference_of_losses']:.1g} at most.",
        "",
        f"Measured on {report['machine']['cpu']}; `{report['command']}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
