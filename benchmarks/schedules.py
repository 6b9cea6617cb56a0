"""How many puzzles each decoding schedule solves, and in how many forwards, on the demo's model before and after RL.

    python benchmarks/schedules.py

trains the demo's checkpoint as `examples/demo.py` does (or takes a trained one, `--after`), decodes the demo's test
puzzles with every schedule under the settings below, and writes `benchmarks/results/schedules.json`, `.md` and `.png`.
Settings were not tuned on these puzzles: everything that was measured is shown. Decoding is greedy where the schedule
allows it; what is drawn is keyed by `--seed`, and intervals are Wilson's at 95 %.

Some schedules need more than the model: `learn2pd` a filter, which is trained on training puzzles for each of the two
checkpoints, `guided` and `edlm` a causal model, which is trained on the demo's training answers. All of it is kept in
`--work`; a run that was stopped goes on where it was. Answers have a fixed length and no end-of-sequence token, so that
schedules about ends and lengths can show here that they do no harm, and no more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from rl4dlm import DecodingConfig, RolloutEngine, available_schedules, load_denoiser, load_task, save_denoiser
from rl4dlm.evaluation import encode_prompt, machine, versions, wilson_interval

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
CELLS = 16
FOR_OTHERS = ("bernoulli", "entropy_bound_canvas", "learned_order", "levenshtein", "s2d2")
"""Schedules for models whose noise is not masking, those that know tokens for edits, and those with blocks alone; and
schedules whose policies are trained first."""


@dataclass(frozen=True)
class Setting:
    """A schedule with settings.

    Args:
        schedule: its name. arguments: its own settings; strings in braces stand for files that the benchmark makes.
        more: other fields of `DecodingConfig`.
    """

    schedule: str
    arguments: Mapping[str, Any]
    more: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The settings in words."""
        shown = {**self.more, **{k: v for k, v in self.arguments.items() if not str(v).startswith("{")}}
        return ", ".join(f"{name} {value}" for name, value in shown.items()) or "defaults"

    def config(self, files: Mapping[str, str]) -> DecodingConfig:
        arguments = {k: v.format(**files) if isinstance(v, str) else v for k, v in self.arguments.items()}
        return DecodingConfig(
            canvas_length=CELLS, schedule=self.schedule, schedule_args=arguments, stop_at_eos=False, **self.more
        )


def several(schedule: str, *arguments: Mapping[str, Any], steps: Sequence[int] = (), **more: Any) -> list[Setting]:
    """A setting for each of the arguments, at each number of steps."""
    counts: list[dict[str, Any]] = [{"steps": count} for count in steps] or [{}]
    return [Setting(schedule, a, {**count, **more}) for a in arguments or ({},) for count in counts]


EVEN = (1, 2, 4, 8, 16)
GROUPS: dict[str, list[Setting]] = {
    "LLaDA": [
        *several("low_confidence", steps=EVEN),
        *several("random", steps=EVEN[1:]),
        *several("left_to_right", steps=EVEN[1:]),
    ],
    "Dream": [
        *several("dream_origin", steps=(4, 8, 16, 32)),
        *several("dream_maskgit_plus", steps=(2, 4, 8)),
        *several("dream_topk_margin", steps=EVEN[1:]),
        *several("dream_entropy", {}, {"alg_temp": 0.1}, steps=EVEN[1:]),
        *several("dream_threshold", {"threshold": 0.9}, {"threshold": 0.6}, steps=(4, 8)),
    ],
    "as sure as it takes": [
        *several("threshold", *({"threshold": value} for value in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99))),
        *several("factor", *({"factor": value} for value in (0.25, 0.5, 1.0, 2.0, 4.0))),
        *several("entropy_bound", *({"gamma": value} for value in (0.1, 0.3, 1.0, 2.0, 4.0))),
        *several(
            "learn2pd", *({"filter_path": "{filter}", "acceptance": value} for value in (0.5, 0.7, 0.8, 0.9, 0.96))
        ),
        *several(
            "klass",
            {"threshold": 0.9},
            {"threshold": 0.6, "kl_threshold": 0.1, "history": 1},
            {"threshold": 0.5, "kl_threshold": 0.3, "history": 1},
            steps=(16,),
        ),
    ],
    "several open blocks, sub-blocks, a window": [
        *several("sliding_window", {}, {"window": 8, "entropy_threshold": 1.0}),
        *several(
            "sub_blocks", {"sub_block_length": 4, "first_alone": False}, {"sub_block_length": 2, "threshold": 0.8}
        ),
        *several("d2f", {}, {"threshold": 0.8, "add_threshold": 0.5}, block_length=4),
        *several("multi_block", {}, {"entropy_threshold": 1.0, "add_threshold": 0.5}, block_length=4),
    ],
    "dInfer and latent refinement": [
        *several(
            "hierarchical",
            {},
            {"threshold": 0.8, "low_threshold": 0.3},
            {"threshold": 0.7, "low_threshold": 0.5},
            {"threshold": 0.99, "low_threshold": 0.7},
            {"threshold": 0.8, "low_threshold": 0.3, "remask_threshold": 0.3},
        ),
        *several("credit", *({"threshold": value} for value in (0.6, 0.7, 0.8, 0.9, 0.95))),
        *several("smoothing", *({"threshold": value, "threshold_decay": 0.1} for value in (0.6, 0.8, 0.9))),
        *several(
            "latent_refinement",
            *({"threshold": value, "refine_steps": 4} for value in (0.6, 0.8, 0.9)),
            {"threshold": 0.9, "feedback": 0.05, "refine_steps": 0},
        ),
    ],
    "with corrections": [
        *several("rcr", steps=(2, 4, 8, 16)),
        *several("rcr", {"counts": "cosine"}, steps=(4, 8)),
        *several(
            "wino",
            {},
            {"threshold": 0.5, "verify_threshold": 0.7},
            {"threshold": 0.7, "verify_threshold": 0.9, "min_cap": 2, "max_cap": 4},
        ),
        *several("saber", {"min_tokens": 1}, {"min_tokens": 2}, {"min_tokens": 4}),
        *several("editing", *({"editing_threshold": value} for value in (0.5, 0.7, 0.9)), steps=(4, 8)),
        *several("sdar_dynamic", {"threshold": 0.85}, {"threshold": 0.6}, steps=(4, 8)),
    ],
    "blocks, ends and lengths": [
        *several("adablock", {"default_block": 4, "threshold": 0.9}, {"default_block": 8, "threshold": 0.8}),
        *several("ctrldiff", {"sizes": (2, 4, 8), "threshold": 0.9}, {"sizes": (4, 8, 16), "threshold": 0.8}),
        *several("daedal", *({"start_length": CELLS, "window": CELLS, "high": value} for value in (0.7, 0.9))),
        *several("ass", {}, {"num_blocks": 2}),
        *several("eoser_ass"),
        *several("eoser", steps=(4, 8)),
        *several("pc_sampler", {"decay": 0.25}, {"decay": 0.05}, steps=(4, 8, 16)),
        *several("schema", steps=(4, 8)),
    ],
    "a second model": [
        *several(
            "guided",
            {"guide": "{causal}", "top_k": 1, "ratio": 0.0},
            {"guide": "{causal}"},
            {"guide": "{causal}", "top_k": 4, "ratio": 0.1},
            {"guide": "{causal}", "top_k": 2, "ratio": 0.5, "accept": "all"},
        ),
        *several(
            "edlm",
            *({"energy": "{causal}", "drafts": drafts, "order": "low_confidence"} for drafts in (1, 2, 4, 8)),
            steps=(4, 8),
            temperature=1.0,
        ),
    ],
}
REFERENCE = "low_confidence"


def main() -> None:
    """Measures what has no result yet, then writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=Path, help="a checkpoint that RL made of the demo's; default: train it now")
    parser.add_argument("--before", type=Path, default=ROOT / "examples" / "demo_checkpoint")
    parser.add_argument("--puzzles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of training and of what is drawn while decoding")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "schedules")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="few puzzles, settings and training steps: a try")
    options = parser.parse_args()
    if options.quick:
        options.puzzles, options.work, options.output = 20, options.work / "quick", options.work / "quick"
    missing = set(available_schedules()) - set(FOR_OTHERS) - {s.schedule for group in GROUPS.values() for s in group}
    assert not missing, f"no settings for {sorted(missing)}"
    options.work.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.before)
    checkpoints = {"before": options.before, "after": options.after or trained(options, tokenizer)}
    causal = causal_model(options, tokenizer)
    jobs = [(name, setting) for name in checkpoints for group in GROUPS.values() for setting in chosen(group, options)]
    record = Record(options.work / "measurements.jsonl")
    puzzles = Puzzles(options.puzzles, tokenizer)
    results: list[dict[str, Any]] = []
    loaded: dict[str, Any] = {}
    for name, setting in tqdm(jobs, desc="measuring", unit="setting"):
        if name not in loaded:
            loaded = {name: load_denoiser(checkpoints[name]).eval()}
            files = {"causal": str(causal), "filter": str(token_filter(options, name, loaded[name], tokenizer))}
            prints = [fingerprint(path) for path in (checkpoints[name], causal, Path(files["filter"]))]
        key = [prints, setting.schedule, setting.label, options.puzzles, options.seed]
        found = record.get(key)
        if found is None:
            found = puzzles.measure(loaded[name], setting.config(files), options.seed)
            record.put(key, found)
        results.append({"model": name, "schedule": setting.schedule, "settings": setting.label, **found})
    report = {
        "command": "python benchmarks/schedules.py" + (" --quick" if options.quick else ""),
        "task": "few-clue 4x4 Sudoku, 2 or 3 clues: the test puzzles of examples/demo.py",
        "puzzles": options.puzzles,
        "seeds": {"training": options.seed, "decoding": options.seed},
        "after": "given" if options.after else "trained by the recipe of examples/demo.py",
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "schedules.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.output / "schedules.md").write_text(text)
    plot(report, options.output / "schedules.png")
    print(text)


def chosen(group: list[Setting], options: argparse.Namespace) -> list[Setting]:
    """All settings, or with `--quick` the first of each schedule."""
    if not options.quick:
        return group
    first: dict[str, Setting] = {}
    for setting in group:
        first.setdefault(setting.schedule, setting)
    return list(first.values())


# --- measuring --------------------------------------------------------------------------------------------------------


class Puzzles:
    """The demo's test puzzles.

    Args:
        count: how many of them. tokenizer: of the model.
    """

    def __init__(self, count: int, tokenizer: Any) -> None:
        from make_demo_checkpoint import demo_task

        self.task, self.tokenizer = demo_task(), tokenizer
        dataset = self.task.dataset("test")
        self.rows = list(dataset.select(range(min(count, len(dataset)))))
        self.prompts = [encode_prompt(tokenizer, row["prompt"]) for row in self.rows]

    def measure(self, model: Any, config: DecodingConfig, seed: int) -> dict[str, Any]:
        """Solve rate and cost of a decoding setting."""
        started = time.perf_counter()
        rollout = RolloutEngine(model).generate(self.prompts, config, seed=seed)
        seconds = time.perf_counter() - started
        texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        solved = sum(bool(verdict) for verdict in self.task.check_many(texts, self.rows))
        trials = len(self.rows)
        return {
            "solve_rate": solved / trials,
            "interval": wilson_interval(solved, trials),
            "nfe": rollout.nfe.double().mean().item(),
            "extra_forwards": rollout.extra_forwards.double().mean().item(),
            "seconds": round(seconds, 2),
            "decoding": {**asdict(config), "schedule_args": {k: _shown(v) for k, v in config.schedule_args.items()}},
        }


def _shown(value: Any) -> str:
    """A setting in words; of a path, which is of this machine, the name."""
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


class Record:
    """Measurements that were made, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found = {json.dumps(entry["key"]): entry["result"] for entry in map(json.loads, lines)}

    def get(self, key: list[Any]) -> dict[str, Any] | None:
        return self.found.get(json.dumps(key))

    def put(self, key: list[Any], result: dict[str, Any]) -> None:
        self.found[json.dumps(key)] = result
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")


def fingerprint(path: Path) -> str:
    """Of a checkpoint's weights or of a file."""
    return hashlib.sha256((path / "model.safetensors" if path.is_dir() else path).read_bytes()).hexdigest()[:16]


# --- what is trained --------------------------------------------------------------------------------------------------


def trained(options: argparse.Namespace, tokenizer: Any) -> Path:
    """The checkpoint after RL, by the demo's recipe."""
    from demo import LearningCurve, build_trainer

    def make(path: Path) -> None:
        steps = 2 if options.quick else 150
        settings = argparse.Namespace(
            train="rl", seed=options.seed, max_steps=steps, seconds=None, output=options.work / "training"
        )
        curve = LearningCurve(tokenizer, every=10 * steps)
        trainer = build_trainer(settings, load_denoiser(options.before), tokenizer, curve)
        trainer.train()
        save_denoiser(trainer.model, path, tokenizer)

    return made(options.work / f"after-{fingerprint(options.before)}-{options.seed}", make)


def token_filter(options: argparse.Namespace, name: str, model: Any, tokenizer: Any) -> Path:
    """The filter of `learn2pd` for a checkpoint."""
    from make_demo_checkpoint import demo_task
    from train_learn2pd_filter import collect, fit

    from rl4dlm.rollout.schedules.learn2pd import save_filter

    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:16]

    def make(path: Path) -> None:
        rows = demo_task().dataset("train").select(range(20 if options.quick else 500))
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
        examples = collect(RolloutEngine(model), prompts, {"canvas_length": CELLS})
        network = fit(examples, 2 if options.quick else 200, options.seed)
        save_filter(network, path, temperature=0.0, cache="none")

    return made(options.work / f"filter-{name}-{weights}.safetensors", make)


def causal_model(options: argparse.Namespace, tokenizer: Any) -> Path:
    """A causal language model that has read the demo's training puzzles and answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(path: Path) -> None:
        rows = load_task("few_clue_sudoku", size=20_000, seed=1).rows("train")
        ids = torch.tensor([tokenizer(row["prompt"] + row["solution"]).input_ids for row in rows])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=96,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    intermediate_size=192,
                    max_position_embeddings=64,
                    initializer_range=0.06,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    bos_token_id=None,
                )
            )
        steps = 2 if options.quick else 1000
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(options.seed)
        for _ in tqdm(range(steps), desc="causal model", unit="step"):
            batch = ids[torch.randint(len(ids), (128,), generator=generator)]  # [B, T]
            labels = batch.clone()
            labels[:, :-CELLS] = -100
            loss = model(input_ids=batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay.step()
        model.save_pretrained(path)

    return made(options.work / f"causal-{options.seed}", make)


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """The path, after making what belongs there if it is not there; never left half made."""
    if not path.exists():
        unfinished = path.with_name(f"unfinished-{path.name}")
        make(unfinished)
        unfinished.rename(path)
    return path


# --- showing ----------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """All settings, before and after, in Markdown."""
    lines = [
        f"Share of {report['puzzles']} test puzzles solved (95 % interval) and mean forwards per puzzle, before and "
        f"after diffu-GRPO at 4 steps; {report['task']}. Seeds: {report['seeds']}. `guided` and `edlm` also use a "
        "causal model, whose forwards stand behind the plus sign.",
        "",
        "| schedule | settings | forwards | before | forwards | after |",
        "|---|---|---:|---:|---:|---:|",
    ]
    found = {(r["model"], r["schedule"], r["settings"]): r for r in report["results"]}
    for model, schedule, settings in found:
        if model == "before":
            cells = [c for name in ("before", "after") for c in _cells(found[name, schedule, settings])]
            lines.append(f"| `{schedule}` | {settings} | " + " | ".join(cells) + " |")
    about = report["machine"]
    lines += ["", f"Measured on {about['cpu']}, {about['threads']} thread(s); `{report['command']}`.", ""]
    return "\n".join(lines)


def _cells(result: Mapping[str, Any]) -> tuple[str, str]:
    low, high = result["interval"]
    extra = f" + {result['extra_forwards']:.1f}" if result["extra_forwards"] else ""
    return f"{result['nfe']:.1f}{extra}", f"{result['solve_rate']:.3f} [{low:.3f}, {high:.3f}]"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Solve rate against forwards, a panel per group of schedules, low confidence behind all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    figure, panels = pyplot.subplots(
        -(-len(GROUPS) // columns), columns, figsize=(11, 15), sharex=True, sharey=True, layout="constrained"
    )
    for axes in panels.flat[len(GROUPS) :]:
        axes.axis("off")
    for axes, (group, settings) in zip(panels.flat, GROUPS.items(), strict=False):
        for model, style in (("before", "--"), ("after", "-")):
            points = _points(report, REFERENCE, model)
            axes.plot(*zip(*points, strict=True), color="0.7", linestyle=style, linewidth=3, zorder=0)
        for number, schedule in enumerate(dict.fromkeys(setting.schedule for setting in settings)):
            for model, style, fill in (("before", "--", "none"), ("after", "-", "full")):
                points = _points(report, schedule, model)
                label = schedule if model == "after" else None
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    fillstyle=fill,
                    linewidth=1,
                    label=label,
                )
        axes.set(title=group, xscale="log", ylim=(0, 1.02))
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    figure.supxlabel("forwards per puzzle (NFE)")
    figure.supylabel(f"solved, of {report['puzzles']} puzzles; dashed: before RL, solid: after; grey: {REFERENCE}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(report: Mapping[str, Any], schedule: str, model: str) -> list[tuple[float, float]]:
    results = [r for r in report["results"] if (r["schedule"], r["model"]) == (schedule, model)]
    return sorted((r["nfe"], r["solve_rate"]) for r in results)


if __name__ == "__main__":
    main()
