"""`rl4dlm eval`: how often a checkpoint solves tasks, as a table and a JSON file; measured by `rl4dlm.evaluation`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl4dlm import resources
from rl4dlm.cli.decoding import add_decoding_flags, count, decoding_settings, device_of, listed, named_tasks, numbers

if TYPE_CHECKING:
    from rl4dlm.evaluation import EvaluationResult
    from rl4dlm.evaluation.pass_at import PassAt
    from rl4dlm.rollout.decoding import DecodingConfig


def add_eval_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Measure how often a checkpoint solves a task, and how many forwards that takes."
    command = commands.add_parser("eval", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=evaluate)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--task", required=True, help="names of tasks, with commas between them")
    add("--task-args", metavar="JSON", help="options of the task; with several tasks, an object per name")
    add("--split", default="test", help="split of the task (default: %(default)s)")
    add("--limit", type=count, metavar="N", help="use the first N prompts at most")
    add("--steps", help="numbers of denoising steps to measure, with commas between them (default: half the canvas)")
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
    tasks = named_tasks(listed("task", arguments.task), arguments.task_args)
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
        )
        results.append(result)
        _show(result)
        if arguments.output is not None:
            write_results(arguments.output, results)
            console.print(f"written to {arguments.output}")
    return 0


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
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.task}, {result.split} split, {result.model} (chosen by: {result.chosen_by})")
    further = sorted({name for measured in result.measurements.values() for name in measured.metrics})
    ks = list(next(iter(result.measurements.values())).pass_at)
    for heading in (
        "decoding",
        "solved",
        "95 % interval",
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
            *(_with_interval(measured.pass_at[k]) for k in ks),
            *("" if value is None else f"{value:.3f}" for value in map(measured.metrics.get, further)),
            f"{measured.nfe:.1f}",
            f"{measured.tokens_per_forward:.2f}",
            f"{measured.completion_length:.1f}",
            str(measured.prompts) + (f" x {measured.samples}" if measured.samples > 1 else ""),
        )
    Console().print(table)


def _with_interval(found: PassAt | None) -> str:
    return "" if found is None else f"{found.rate:.3f} ({found.interval[0]:.3f} to {found.interval[1]:.3f})"
