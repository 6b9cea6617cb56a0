"""`rl4dlm filter`: the prompts of a task whose answers are lost, wrong or right; sorted by `rl4dlm.evaluation`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rl4dlm import resources
from rl4dlm.cli.decoding import add_decoding_flags, count, decoding_settings, device_of, named_tasks

KINDS = ("lost", "wrong", "right")


def add_filter_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = (
        "Keep the prompts of a task whose answers are lost while they are decoded: some step predicts a right one, and "
        "the last one is wrong."
    )
    command = commands.add_parser("filter", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=keep)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--task", required=True, help="name of the task")
    add("--task-args", metavar="JSON", help="options of the task")
    add("--split", default="train", help="split of the task (default: %(default)s)")
    add("--limit", type=count, metavar="N", help="look at the first N prompts at most")
    add("--steps", type=count, metavar="N", help="denoising steps (default: half the canvas)")
    add_decoding_flags(add)
    add("--kind", default="lost", choices=KINDS, help="prompts to keep: right answers that are lost, answers that are "
        "never right, or right ones (default: %(default)s)")  # fmt: skip
    add("--output", required=True, metavar="FILE", help=".jsonl file to write, a row of the task in each line")


def keep(arguments: argparse.Namespace) -> int:
    """Decodes a task's prompts and writes the rows of one kind."""
    from rich.console import Console

    from rl4dlm.cli.arguments import mapping
    from rl4dlm.evaluation.lost import OUTCOMES, outcomes
    from rl4dlm.models.loading import load_denoiser, load_tokenizer
    from rl4dlm.rollout.decoding import DecodingConfig

    # Everything that can be wrong is looked at before weights are read.
    device = device_of(arguments.device)
    config = DecodingConfig(steps=arguments.steps, record=("fillings",), **decoding_settings(arguments))
    template = mapping("chat-template-kwargs", arguments.chat_template_kwargs)
    if arguments.num_samples != 1:
        raise ValueError(f"num-samples={arguments.num_samples} is not allowed; one completion of a prompt is looked at")
    output = Path(arguments.output)
    if output.suffix != ".jsonl" or output.is_dir():
        raise ValueError(f"output={arguments.output!r} is not allowed; name a .jsonl file")
    (task,) = named_tasks([arguments.task], arguments.task_args)
    dataset = task.dataset(arguments.split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"task {task.name!r} has no column 'prompt', only {dataset.column_names}")
    limit = len(dataset) if arguments.limit is None else min(arguments.limit, len(dataset))
    rows = list(dataset.select(range(limit)))

    console = Console(stderr=True)
    with console.status(f"loading {arguments.model}"):
        path = resources.model_folder(arguments.model)
        tokenizer = load_tokenizer(path)
        model = load_denoiser(path, dtype=arguments.dtype, device=device).eval()
    found = outcomes(
        model,
        tokenizer,
        task,
        rows,
        config,
        seed=arguments.seed,
        batch_rows=arguments.batch_rows,
        progress=True,
        chat_template_kwargs=template,
    )
    kept = [row for row, kind in zip(rows, found, strict=True) if kind == arguments.kind]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    counts = ", ".join(f"{kind}: {found.count(kind)}" for kind in OUTCOMES)
    unjudged = found.count(None)
    console.print(f"{len(rows)} prompts, {counts}" + (f", not judged: {unjudged}" if unjudged else ""))
    console.print(f"{len(kept)} of them ({arguments.kind}) written to {output}")
    return 0
