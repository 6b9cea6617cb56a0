"""What every algorithm learns on the demo's puzzles from the same number of completions, with its own settings.

Trains the demo's checkpoint with each algorithm as its `configs/<algorithm>/few_clue_sudoku_tiny.yaml` says, but for
the number of steps and the size of a batch: all runs see as many completions, and learning rates fall to zero over
them. Before and after, the demo's test puzzles are decoded greedily in 1, 2, 4, 8 and 16 steps; while training,
validation puzzles in 4.

    python benchmarks/demo_algorithms.py

writes `demo_algorithms.json`, `.md` and `.png` in `benchmarks/results/`. Runs are kept in `--work`; one that is there
is not made again. Seeds vary training alone. Tasks with ends and lengths are in `algorithms.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "few_clue_sudoku_tiny.yaml"
ALGORITHMS = {
    "diffu_grpo": "diffu-GRPO",
    "coupled_grpo": "coupled-GRPO",
    "unigrpo": "UniGRPO",
    "spg": "SPG",
    "diffusion_gdpo": "GDPO (diffusion)",
    "espo": "ESPO",
    "bgpo": "BGPO",
    "dmpo": "DMPO",
    "wd1": "wd1",
    "justgrpo": "JustGRPO",
    "dream_coder_rl": "Dream-Coder RL",
    "igpo": "IGPO",
}
"""Folders in configs/, and names."""
TRAINERS = {
    "diffu_grpo": "DiffuGRPOTrainer",
    "coupled_grpo": "CoupledGRPOTrainer",
    "unigrpo": "UniGRPOTrainer",
    "spg": "SPGTrainer",
    "diffusion_gdpo": "DiffusionGDPOTrainer",
    "espo": "ESPOTrainer",
    "bgpo": "BGPOTrainer",
    "dmpo": "DMPOTrainer",
    "wd1": "WD1Trainer",
    "justgrpo": "JustGRPOTrainer",
    "dream_coder_rl": "DreamCoderRLTrainer",
    "igpo": "IGPOTrainer",
}
TRAINED = "4"  # denoising steps that all train with


def main() -> None:
    """Runs what has no result yet, then summarises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=60, help="generation batches")
    parser.add_argument("--completions", type=int, default=128, help="in a batch, in groups of 16")
    parser.add_argument("--puzzles", type=int, default=500, help="test puzzles to measure on")
    parser.add_argument(
        "--all-completions", action="store_true", help="those below the baseline teach too, as published"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "demo_algorithms")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--train", metavar="NAME", help="one run, of the first of --seeds, into --work")
    options = parser.parse_args()
    if options.train:
        train(options.train, options.seeds[0], options)
        return
    jobs = [(name, seed) for seed in options.seeds for name in options.algorithms]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: run(*job, options), jobs))
    runs = {name: [r for r in results if r["algorithm"] == name] for name in options.algorithms}
    first = results[0]
    report = {
        "command": command(parser, options),
        "batches": options.batches,
        "completions_per_batch": options.completions,
        "test_puzzles": options.puzzles,
        "trained_with_steps": int(TRAINED),
        "seeds": options.seeds,
        "machine": first["machine"],
        "versions": first["versions"],
        "before": first["before"],
        "runs": {
            name: [{k: v for k, v in r.items() if k not in ("machine", "versions")} for r in found]
            for name, found in runs.items()
        },
    }
    stem = "demo_algorithms_with_negatives" if options.all_completions else "demo_algorithms"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.output / f"{stem}.md").write_text(text)
    plot(report, options.output / f"{stem}.png")
    print(text)


def command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """What to type for these settings, but for those of where and how runs are made."""
    words = ["python benchmarks/demo_algorithms.py"]
    for name in ("algorithms", "seeds", "batches", "completions", "puzzles", "all_completions"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    return " ".join(words)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one run, made now if they are not there."""
    kind = "-all" if options.all_completions else ""
    folder = options.work / f"{name}-{options.batches}x{options.completions}-{options.puzzles}-{seed}{kind}"
    path = folder / "result.json"
    if not path.is_file():
        start = [sys.executable, __file__, "--train", name, "--seeds", str(seed), "--batches", str(options.batches)]
        start += ["--completions", str(options.completions), "--puzzles", str(options.puzzles), "--work", str(folder)]
        start += ["--all-completions"] if options.all_completions else []
        print(" ".join(start), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(start, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- one run ----------------------------------------------------------------------------------------------------------


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """Measures, trains, measures again, and writes `result.json`."""
    batches, puzzles, folder = options.batches, options.puzzles, options.work
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import LearningCurve, measure
    from transformers import AutoTokenizer

    import rl4dlm
    from rl4dlm import load_denoiser, load_rewards, load_task
    from rl4dlm.tasks import Task

    trainer_class = getattr(rl4dlm, TRAINERS[name])
    settings = yaml.safe_load((ROOT / "configs" / name / CONFIG).read_text())
    checkpoint = ROOT / settings.pop("model_name_or_path")
    task: Task = load_task(settings.pop("task"), **{**settings.pop("task_args"), "seed": seed + 1})
    rewards = load_rewards(settings.pop("reward_funcs"))
    steps = batches * settings.get("num_iterations", 1)
    settings |= {
        "output_dir": str(folder / "trainer"),
        "seed": seed,
        "max_steps": steps,
        "per_device_train_batch_size": options.completions,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings.pop("save_steps", None)
    if options.all_completions:  # then these settings have the papers' values, which are the defaults
        for setting in ("negative_advantage_weight", "negatives", "weight_baseline"):
            settings.pop(setting, None)
    config = trainer_class.config_class(**settings)
    model, tokenizer = load_denoiser(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    before = measure(model, tokenizer, puzzles, "before training")
    order_before = own_order(model, tokenizer, config.schedule, puzzles)
    curve = LearningCurve(tokenizer, every=max(steps // 6, 1))
    trainer = trainer_class(
        model,
        reward_funcs=rewards,
        args=config,
        train_dataset=task.dataset("train"),
        processing_class=tokenizer,
        callbacks=[curve],
    )
    scored: list[int] = []  # views per row of a loss
    decoded: list[int] = []  # rows
    loss, decode = trainer.loss, trainer._decode

    def counted(scores: Any, batch: Any) -> Any:
        scored.append(scores.views.hidden.shape[1])
        return loss(scores, batch)

    def counted_rows(ids: Any, *rest: Any) -> Any:
        decoded.append(len(ids))
        return decode(ids, *rest)

    trainer.loss, trainer._decode = counted, counted_rows
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - curve.seconds
    after = measure(trainer.model, tokenizer, puzzles, "after training")
    result = {
        "algorithm": name,
        "seed": seed,
        "steps": steps,
        "completions": batches * config.per_device_train_batch_size,
        "decoded": sum(decoded),  # with the second attempts of guidance
        "views": sum(scored) / len(scored),
        "seconds": round(seconds, 1),
        "before": before.solve_rates,
        "after": after.solve_rates,
        "own_order": {
            "schedule": config.schedule,
            "before": order_before,
            "after": own_order(trainer.model, tokenizer, config.schedule, puzzles),
        },
        "intervals": {steps: m.interval for steps, m in after.measurements.items()},
        "learning_curve": {"batches": [s * batches / steps for s in curve.steps], "solved": curve.solved},
        "machine": before.machine,
        "versions": before.versions,
    }
    temporary = folder / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, folder / "result.json")


def own_order(model: Any, tokenizer: Any, schedule: str, puzzles: int) -> dict[str, float] | None:
    """Solve rates in the order that an algorithm trains, where that is not the one that all are measured in."""
    from demo import STEPS
    from make_demo_checkpoint import CELLS, demo_task

    from rl4dlm import DecodingConfig
    from rl4dlm.evaluation import evaluate

    if schedule == "low_confidence":
        return None
    decodings = {s: DecodingConfig(canvas_length=CELLS, steps=s, schedule=schedule) for s in STEPS}
    return evaluate(model, tokenizer, demo_task(), decodings=decodings, split="test", limit=puzzles).solve_rates


# --- showing ----------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Solve rates by algorithm, the most at 4 steps first."""
    steps = list(report["before"])
    lines = [
        f"Share of {report['test_puzzles']} test puzzles solved after {report['batches']} batches of "
        f"{report['completions_per_batch']} completions, all decoded in {TRAINED} steps: mean over seeds "
        f"{report['seeds']}, at {TRAINED} steps also the lowest and highest. `views`: forwards and backwards per "
        "completion and update. Time: one thread, another run beside.",
        "",
        f"| algorithm | views | gain at {TRAINED} steps, by seed | "
        + " | ".join(f"{s} step{'s' * (s != '1')}" for s in steps)
        + " | training |",
        "|---|---:|---:|" + "---:|" * (len(steps) + 1),
        "| before | | | " + " | ".join(f"{report['before'][s]:.3f}" for s in steps) + " | |",
    ]
    for name, found in sorted(report["runs"].items(), key=lambda item: -mean(r["after"][TRAINED] for r in item[1])):
        gains = ", ".join(f"{100 * (r['after'][TRAINED] - r['before'][TRAINED]):+.1f}" for r in found)
        cells = [
            f"{mean(rates):.3f}" + (f" [{min(rates):.3f}, {max(rates):.3f}]" if s == TRAINED else "")
            for s in steps
            for rates in [[r["after"][s] for r in found]]
        ]
        views, seconds = (mean(r[key] for r in found) for key in ("views", "seconds"))
        lines.append(f"| {ALGORITHMS[name]} | {views:.3g} | {gains} | {' | '.join(cells)} | {seconds:.0f} s |")
    return "\n".join([*lines, "", f"Measured on {report['machine']['cpu']}; `{report['command']}`.", ""])


def mean(values: Sequence[float] | Any) -> float:
    """The mean of numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Left: gain by algorithm and seed. Right: mean learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    ordered = sorted(report["runs"].items(), key=lambda item: mean(r["after"][TRAINED] for r in item[1]))
    for place, (name, found) in enumerate(ordered):
        gains = [100 * (r["after"][TRAINED] - r["before"][TRAINED]) for r in found]
        color = f"C{list(ALGORITHMS).index(name) % 10}"
        left.barh(place, mean(gains), color=color, alpha=0.5)
        left.plot(gains, [place] * len(gains), "o", color=color, markersize=4)
        curves = [r["learning_curve"] for r in found]
        solved = [mean(values) for values in zip(*(c["solved"] for c in curves), strict=True)]
        style = "-" if list(ALGORITHMS).index(name) < 10 else "--"
        right.plot(curves[0]["batches"], solved, color=color, linestyle=style, label=ALGORITHMS[name])
    left.axvline(10, color="0.4", linestyle=":")
    left.set_yticks(range(len(ordered)), [ALGORITHMS[name] for name, _ in ordered])
    left.set(xlabel=f"points gained at {TRAINED} steps, test puzzles (dots: seeds)")
    right.set(
        xlabel=f"batches of {report['completions_per_batch']} completions",
        ylabel=f"validation puzzles solved in {TRAINED} steps",
    )
    right.legend(fontsize="x-small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
