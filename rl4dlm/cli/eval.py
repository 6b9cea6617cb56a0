"""`rl4dlm eval`: how often a checkpoint solves tasks, as a table and a JSON file; measured by `rl4dlm.evaluation`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl4dlm import resources
from rl4dlm.cli.decoding import (
    add_decoding_flags,
    count,
    decoding_settings,
    device_of,
    listed,
    named_tasks,
    numbers,
    table_console,
)

if TYPE_CHECKING:
    from rl4dlm.evaluation import EvaluationResult, Measurement, Rewards
    from rl4dlm.evaluation.pass_at import PassAt
    from rl4dlm.rollout.decoding import DecodingConfig
    from rl4dlm.tasks import Task


def add_eval_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Measure how often a checkpoint solves a task, or what reward functions say, and at how many forwards."
    command = commands.add_parser("eval", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=evaluate)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--task", help="names of tasks, with commas between them")
    add("--dataset", metavar="FILE", help=".jsonl, .json, .csv or .parquet file with a column `prompt`; instead of a "
        "task, with --reward-funcs")  # fmt: skip
    add("--task-args", metavar="JSON", help="options of the task; with several tasks, an object per name")
    add("--split", default="test", help="split of the task (default: %(default)s)")
    add("--limit", type=count, metavar="N", help="use the first N prompts at most")
    add("--steps", help="numbers of denoising steps to measure, with commas between them (default: half the canvas)")
    add("--baseline", action="store_true", help="measure one token per step, too, and the difference to it")
    add("--prompt-styles", metavar="LIST", help="measure with each of these prompt styles of the task")
    add("--reward-funcs", "--reward_funcs", metavar="LIST", help="rewards to measure, too: names of plugins, "
        "path/to/file.py:function or module:function, with commas between them")  # fmt: skip
    add("--reward-threshold", type=float, metavar="X", help="a sum of rewards of at least X counts as solved "
        "(default: the task's checker decides; of a dataset, 1)")  # fmt: skip
    add_decoding_flags(add)
    add("--pass-at", metavar="LIST", help="k for pass@k, with commas between them, at most --num-samples")
    add("--chosen-by", default="not stated", metavar="TEXT", help="how this checkpoint was chosen, for the record")
    add("--output", metavar="FILE", help="JSON file to write")


def evaluate(arguments: argparse.Namespace) -> int:
    """Measures a checkpoint on tasks; prints a table per task and writes the JSON file after each."""
    from rich.console import Console

    from rl4dlm.cli.arguments import mapping
    from rl4dlm.evaluation import evaluate, write_results
    from rl4dlm.models.loading import load_denoiser, load_tokenizer

    # Everything that can be wrong is looked at before weights are read.
    device = device_of(arguments.device)
    decodings = _decodings(arguments)
    ks = _pass_at(arguments)
    template = mapping("chat-template-kwargs", arguments.chat_template_kwargs)
    tasks, rewards = _tasks(arguments), _rewards(arguments)
    for task in tasks:
        task.require()
        task.dataset(arguments.split)  # raises if there is no such split, or a file or the hub cannot be read
    if arguments.output is not None and Path(arguments.output).is_dir():
        raise ValueError(f"output={arguments.output!r} is a folder; name a .json file")

    console = Console(stderr=True)
    with console.status(f"loading {arguments.model}"):
        path = resources.model_folder(arguments.model)
        tokenizer = load_tokenizer(path)
        model = load_denoiser(path, dtype=arguments.dtype, device=device).eval()
    results: list[EvaluationResult] = []
    for task in tasks:
        result = evaluate(
            model,
            tokenizer,
            task,
            decodings=decodings,
            split=arguments.split,
            limit=arguments.limit,
            num_samples=arguments.num_samples,
            seed=arguments.seed,
            batch_rows=arguments.batch_rows,
            chosen_by=arguments.chosen_by,
            progress=True,
            chat_template_kwargs=template,
            pass_at=ks,
            baseline=arguments.baseline,
            rewards=rewards,
        )
        results.append(result)
        _show(result)
        if arguments.output is not None:
            write_results(arguments.output, results)
            console.print(f"written to {arguments.output}")
    if arguments.prompt_styles is not None:
        _show_styles(results)
    return 0


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    """What to measure on: tasks, each in every prompt style that is named, or a file."""
    from rl4dlm.evaluation import DatasetTask

    if (arguments.task is None) == (arguments.dataset is None):
        raise ValueError("eval needs something to measure on: either --task or --dataset")
    if arguments.dataset is not None:
        for name in ("task_args", "prompt_styles"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name.replace('_', '-')} belongs to --task; leave it out with --dataset")
        if arguments.reward_funcs is None:
            raise ValueError(f"dataset={arguments.dataset!r} has no checker; name --reward-funcs that judge it")
        return [DatasetTask(arguments.dataset)]
    tasks = named_tasks(listed("task", arguments.task), arguments.task_args)
    if arguments.prompt_styles is None:
        return tasks
    found: list[Task] = []
    styles = listed("prompt-styles", arguments.prompt_styles)
    for task in tasks:
        if "style" not in getattr(task, "__dataclass_fields__", {}):
            raise ValueError(f"prompt-styles={arguments.prompt_styles!r}: task {task.name!r} has one style of prompt")
        found += [replace(task, style=style) for style in styles]  # type: ignore[type-var]
    return found


def _rewards(arguments: argparse.Namespace) -> Rewards | None:
    from rl4dlm.evaluation import Rewards
    from rl4dlm.grading import load_rewards

    if arguments.reward_funcs is None:
        if arguments.reward_threshold is not None:
            raise ValueError(f"reward-threshold={arguments.reward_threshold} has no meaning without --reward-funcs")
        return None
    names = listed("reward-funcs", arguments.reward_funcs)
    threshold = arguments.reward_threshold
    if threshold is None and arguments.dataset is not None:
        threshold = 1.0
    return Rewards(dict(zip(_short(names), load_rewards(names), strict=True)), threshold=threshold)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the folders of files, where that leaves them distinct: they become columns of tables."""
    short = [name.rpartition("/")[2] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _decodings(arguments: argparse.Namespace) -> dict[str | int, DecodingConfig]:
    from rl4dlm.rollout.decoding import DecodingConfig

    shared = decoding_settings(arguments)
    if arguments.steps is None:
        return {arguments.schedule: DecodingConfig(**shared)}
    steps = numbers("steps", arguments.steps)
    return {step: DecodingConfig(steps=step, **shared) for step in steps}


def _pass_at(arguments: argparse.Namespace) -> list[int]:
    """The k of pass@k. Raises ValueError for samples that are too few, or that are all the same."""
    ks = [] if arguments.pass_at is None else numbers("pass-at", arguments.pass_at)
    for k in ks:
        if not 1 <= k <= arguments.num_samples:
            raise ValueError(f"pass-at={k} is not allowed with num-samples={arguments.num_samples}; it is 1 to that")
    if max(ks, default=1) > 1 and arguments.temperature == 0:
        raise ValueError("pass-at of more than 1 with temperature=0 draws the same completion again and again")
    return ks


def _show(result: EvaluationResult) -> None:
    from rich.table import Table

    asked = f", {result.protocol}" if result.protocol else f", style {result.style}" if result.style else ""
    title = f"{result.task}{asked}, {result.split} split, {result.model} (chosen by: {result.chosen_by})"
    table = Table(title=title)
    compared = {measured.baseline for measured in result.measurements.values()} - {None}
    further = sorted({name for measured in result.measurements.values() for name in measured.metrics})
    ks = list(next(iter(result.measurements.values())).pass_at)
    for heading in (
        "decoding",
        "solved",
        "95 % interval",
        *(["to baseline"] if compared else []),
        *(f"pass@{k}" for k in ks),
        *further,
        "NFE",
        "tokens/forward",
        "length",
        "n",
    ):
        table.add_column(heading, justify="right")
    for label, measured in result.measurements.items():
        low, high = measured.interval
        table.add_row(
            label,
            f"{measured.solve_rate:.3f}",
            f"{low:.3f} to {high:.3f}",
            *([_to_baseline(result, measured)] if compared else []),
            *(_with_interval(measured.pass_at[k]) for k in ks),
            *("" if value is None else f"{value:.3f}" for value in map(measured.metrics.get, further)),
            f"{measured.nfe:.1f}",
            f"{measured.tokens_per_forward:.2f}",
            f"{measured.completion_length:.1f}",
            str(measured.prompts) + (f" x {measured.samples}" if measured.samples > 1 else ""),
        )
    table_console().print(table)
    if result.speed is not None and len(result.speed.points) > 1:
        table_console().print(f"over speed: area {result.speed.area:.3f}, AUP {result.speed.aup:.1f}")


def _to_baseline(result: EvaluationResult, measured: Measurement) -> str:
    """The paired difference to one token per step, with its interval."""
    from rl4dlm.evaluation import paired

    if measured.baseline is None:
        return ""
    pairs = zip(result.measurements[measured.baseline].item_values(), measured.item_values(), strict=True)
    judged = [(before, after) for before, after in pairs if before is not None and after is not None]
    found = paired([before for before, _ in judged], [after for _, after in judged])
    low, high = found.interval
    return f"{found.difference:+.3f} ({low:+.3f} to {high:+.3f})"


def _show_styles(results: list[EvaluationResult]) -> None:
    """A task in several prompt styles: solve rates beside each other, since the order of decoders may depend on it."""
    from rich.table import Table

    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        table = Table(title=f"{task}: solved, by prompt style")
        for heading in ("decoding", *(str(result.style) for result in of_task), "mean", "range"):
            table.add_column(heading, justify="right")
        for label in of_task[0].measurements:
            rates = [result.measurements[label].solve_rate for result in of_task]
            shown = [*rates, sum(rates) / len(rates), max(rates) - min(rates)]
            table.add_row(label, *(f"{value:.3f}" for value in shown))
        table_console().print(table)


def _with_interval(found: PassAt | None) -> str:
    return "" if found is None else f"{found.rate:.3f} ({found.interval[0]:.3f} to {found.interval[1]:.3f})"
