"""`rl4dlm compare`: two files of results, item by item; the statistics are `rl4dlm.evaluation.compare`'s."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl4dlm.cli.decoding import count, table_console

if TYPE_CHECKING:
    from rl4dlm.evaluation import EvaluationResult


def add_compare_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Compare two files of `rl4dlm eval`: paired differences with intervals, and the items that changed."
    command = commands.add_parser("compare", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=run)
    add = command.add_argument
    add("first", metavar="A.json", help="what is compared with")
    add("second", metavar="B.json", help="what is compared; a difference is B less A")
    add("--labels", metavar="A,B", help="a decoding of each file (default: those that both have)")
    add("--confidence", type=float, default=0.95, metavar="X", help="of the intervals (default: %(default)s)")
    add("--items", type=count, default=20, metavar="N", help="places of changed items to show (default: %(default)s)")
    add("--output", metavar="FILE", help="JSON file to write, with all changed items")


def run(arguments: argparse.Namespace) -> int:
    """Compares what the two files have in common and prints it."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from rl4dlm.evaluation import aup, compare, read_results
    from rl4dlm.files import write_text

    if arguments.output is not None and Path(arguments.output).is_dir():
        raise ValueError(f"output={arguments.output!r} is a folder; name a .json file")
    labels = None if arguments.labels is None else [name.strip() for name in arguments.labels.split(",")]
    if labels is not None and len(labels) != 2:
        raise ValueError(f"labels={arguments.labels!r} is not allowed; name two decodings with a comma between them")
    pairs = _matched(read_results(arguments.first), read_results(arguments.second))
    if not pairs:
        raise ValueError(f"{arguments.first} and {arguments.second} have no task and split in common")
    console, written = table_console(), []
    for first, second in pairs:
        chosen = [(labels[0], labels[1])] if labels else _shared_labels(first, second)
        if not chosen:
            raise ValueError(
                f"{first.task}: no decoding is in both files, only {', '.join(first.measurements)} and "
                f"{', '.join(second.measurements)}; name one of each with --labels"
            )
        table = Table(title=f"{_named(first)}: {first.model} (A), {second.model} (B)")
        for heading in ("decoding", "items", "A", "B", "B - A", "interval", "p", "better", "worse"):
            table.add_column(heading, justify="right")
        for pair in chosen:
            found = compare(first, second, pair, arguments.confidence)
            low, high = found.interval
            table.add_row(
                pair[0] if pair[0] == pair[1] else " / ".join(pair),
                str(found.items),
                f"{found.first:.3f}",
                f"{found.second:.3f}",
                f"{found.difference:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                "" if found.p_value is None else f"{found.p_value:.3g}",
                str(len(found.gained)),
                str(len(found.lost)),
            )
            written.append({"task": first.task, "split": first.split, "labels": pair, **asdict(found)})
        console.print(table)
        for entry in written[-len(chosen) :]:
            for name, what in (("gained", "better"), ("lost", "worse")):
                if entry[name]:
                    shown = ", ".join(map(str, entry[name][: arguments.items]))
                    more = ", …" if len(entry[name]) > arguments.items else ""
                    console.print(f"{entry['labels'][0]}, {what}: {shown}{more}")
        if first.speed is not None and second.speed is not None:
            best = max(rate for result in (first, second) for _, rate in (result.speed.points if result.speed else ()))
            values = [aup(result.speed.points, best) for result in (first, second) if result.speed is not None]
            console.print(
                f"area over speed: {first.speed.area:.3f} and {second.speed.area:.3f}; AUP, with the better of both "
                f"as the best: {values[0]:.1f} and {values[1]:.1f}"
            )
    if arguments.output is not None:
        content = {"first": arguments.first, "second": arguments.second, "comparisons": written}
        write_text(arguments.output, json.dumps(content, indent=2) + "\n")
        Console(stderr=True).print(f"written to {arguments.output}")
    return 0


def _matched(
    first: list[EvaluationResult], second: list[EvaluationResult]
) -> list[tuple[EvaluationResult, EvaluationResult]]:
    """Results of the same task, split and prompt style; where each file has one of a task, their styles may differ."""

    def key(result: EvaluationResult, style: bool) -> tuple[Any, ...]:
        return result.task, result.split, result.style if style else None

    def single(results: list[EvaluationResult], wanted: EvaluationResult) -> bool:
        return sum(key(result, False) == key(wanted, False) for result in results) == 1

    found = []
    for one in first:
        for other in second:
            alone = single(first, one) and single(second, one)
            if key(one, not alone) == key(other, not alone):
                found.append((one, other))
    return found


def _shared_labels(first: EvaluationResult, second: EvaluationResult) -> list[tuple[str, str]]:
    return [(label, label) for label in first.measurements if label in second.measurements]


def _named(result: EvaluationResult) -> str:
    return f"{result.task}, {result.split} split" + (f", style {result.style}" if result.style else "")
