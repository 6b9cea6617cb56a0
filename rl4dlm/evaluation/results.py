"""What a measurement leaves behind: numbers, what they were measured with, and the JSON file that holds both.

Owns the file's schema. A file says which version it has; a change that readers would misunderstand raises it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rl4dlm.evaluation.machine import machine, versions
from rl4dlm.evaluation.pass_at import PassAt
from rl4dlm.evaluation.speed import Speed
from rl4dlm.files import write_text

SCHEMA, VERSION = "rl4dlm.results", 1
"""What a file of results says it is."""

_VERDICTS = {True: "1", False: "0", None: "-"}


@dataclass(frozen=True)
class Measurement:
    """One decoding setting on one set of prompts.

    Args:
        decoding: all fields of the `DecodingConfig`.
        solve_rate: share of the judged completions that the task's checker accepts.
        interval: Wilson interval of `solve_rate` at 95 %, with judged prompts as the trials. With several samples per
            prompt it is on the safe side, since a mean over samples varies less than a single one.
        prompts: number of prompts. samples: completions per prompt.
        unjudged: completions whose row says too little for the checker.
        nfe: mean number of forwards per completion; guidance counts two.
        tokens_per_forward: valid tokens of all completions over all their forwards.
        completion_length: mean number of valid tokens, with the end-of-sequence token.
        ended: share of completions that hold an end-of-sequence token.
        seconds: wall time of decoding.
        metrics: what else the task measures, for example `cell_accuracy`; None where it has no value.
        exact: False if the cache policy approximates.
        pass_at: k to pass@k, for the k asked for; None where no prompt has k completions that could be judged.
        verdicts: a character per completion, prompt by prompt: `1` right, `0` wrong, `-` not judged.
        baseline: label of the measurement with one token per step that this one is to be compared with; None: none was
            made, or it is one itself.
    """

    decoding: dict[str, Any]
    solve_rate: float
    interval: tuple[float, float]
    prompts: int
    samples: int
    unjudged: int
    nfe: float
    tokens_per_forward: float
    completion_length: float
    ended: float
    seconds: float
    metrics: dict[str, float | None]
    exact: bool
    pass_at: dict[str, PassAt | None] = field(default_factory=dict)
    verdicts: str = ""
    baseline: str | None = None

    def item_values(self) -> list[float | None]:
        """For each prompt the share of its judged completions that are right; None where none could be judged."""
        if len(self.verdicts) != self.prompts * self.samples:
            raise ValueError(
                f"verdicts has {len(self.verdicts)} characters for {self.prompts} prompts with {self.samples} samples"
            )
        groups = [self.verdicts[start : start + self.samples] for start in range(0, len(self.verdicts), self.samples)]
        judged = [group.replace("-", "") for group in groups]
        return [group.count("1") / len(group) if group else None for group in judged]


@dataclass(frozen=True)
class EvaluationResult:
    """A model on one task, under one or more decoding settings.

    Args:
        task: name of the task. split: of the task.
        model: path or name of the model. chosen_by: how this checkpoint was chosen among others.
        seed: keys every draw; a row's id is `prompt index * samples + sample`.
        measurements: label to measurement, in the order asked for.
        style: of the prompts, where the task has several. protocol: what is shown before the question, and which items
            are measured, where several ways are published; else "".
        items: what tells prompts apart, with spaces between them: digests of a row's other columns and of its prompt.
        speed: what the accuracies of all measurements come to; None if they have no speed.
        machine: what it ran on. versions: of the libraries.
    """

    task: str
    split: str
    model: str
    chosen_by: str
    seed: int
    measurements: dict[str, Measurement]
    style: str | None = None
    protocol: str = ""
    items: str = ""
    speed: Speed | None = None
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def solve_rates(self) -> dict[str, float]:
        """Label to solve rate."""
        return {label: measurement.solve_rate for label, measurement in self.measurements.items()}

    def item_keys(self, with_prompts: bool) -> dict[tuple[str, str, int], int]:
        """Key of each item to its place: its columns, its prompt if asked for, which of several equal ones it is."""
        seen: Counter[tuple[str, str]] = Counter()
        found = {}
        for place, item in enumerate(self.items.split()):
            columns, _, prompt = item.partition(":")
            name = columns, prompt if with_prompts else ""
            found[*name, seen[name]] = place
            seen[name] += 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def verdict_string(verdicts: Sequence[bool | None]) -> str:
    """As `Measurement.verdicts`."""
    return "".join(_VERDICTS[verdict] for verdict in verdicts)


def item_string(rows: Sequence[Mapping[str, Any]]) -> str:
    """As `EvaluationResult.items`, of rows with a column `prompt`."""

    def digest(value: Any) -> str:
        return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()

    return " ".join(
        f"{digest({name: value for name, value in row.items() if name != 'prompt'})}:{digest(row['prompt'])}"
        for row in rows
    )


def write_results(path: str | os.PathLike[str], results: Sequence[EvaluationResult]) -> None:
    """Writes results as JSON, `{"schema": ..., "version": ..., "results": [...]}`, for `read_results`.

    The file appears under its name only when it is complete.
    """
    content = {"schema": SCHEMA, "version": VERSION, "results": [result.to_dict() for result in results]}
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike[str]) -> list[EvaluationResult]:
    """The results of a file that `write_results` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is of another version, or lacks something.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} holds no results of `rl4dlm eval`: its schema is not {SCHEMA!r}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of {SCHEMA}; this library reads version {VERSION}"
        )
    try:
        return [_result(entry) for entry in content["results"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _result(entry: Mapping[str, Any]) -> EvaluationResult:
    values = _known(EvaluationResult, entry)
    values["measurements"] = {label: _measurement(given) for label, given in entry["measurements"].items()}
    if values.get("speed") is not None:
        speed = _known(Speed, values["speed"])
        values["speed"] = Speed(**{**speed, "points": [(point[0], point[1]) for point in speed["points"]]})
    return EvaluationResult(**values)


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    values = _known(Measurement, entry)
    values["interval"] = tuple(values["interval"])
    values["pass_at"] = {
        k: None if found is None else PassAt(**{**_known(PassAt, found), "interval": tuple(found["interval"])})
        for k, found in values.get("pass_at", {}).items()
    }
    return Measurement(**values)


def _known(kind: type, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass; what the schema has not, and what it lacks, is named."""
    names = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    unknown, missing = sorted(set(entry) - names), sorted(needed - set(entry))
    if unknown or missing:
        raise KeyError(f"{kind.__name__} has unknown entries {unknown} and lacks {missing}")
    return dict(entry)
