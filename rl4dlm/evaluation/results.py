"""What a measurement leaves behind: numbers, what they were measured with, and the JSON file that holds both."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rl4dlm.evaluation.machine import machine, versions
from rl4dlm.evaluation.pass_at import PassAt
from rl4dlm.files import write_text


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


@dataclass(frozen=True)
class EvaluationResult:
    """A model on one task, under one or more decoding settings.

    Args:
        task: name of the task. split: of the task.
        model: path or name of the model. chosen_by: how this checkpoint was chosen among others.
        seed: keys every draw; a row's id is `prompt index * samples + sample`.
        measurements: label to measurement, in the order asked for.
        machine: what it ran on. versions: of the libraries.
    """

    task: str
    split: str
    model: str
    chosen_by: str
    seed: int
    measurements: dict[str, Measurement]
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def solve_rates(self) -> dict[str, float]:
        """Label to solve rate."""
        return {label: measurement.solve_rate for label, measurement in self.measurements.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def write_results(path: str | os.PathLike[str], results: Sequence[EvaluationResult]) -> None:
    """Writes results as JSON, `{"results": [...]}`. The file appears under its name only when it is complete."""
    text = json.dumps({"results": [result.to_dict() for result in results]}, indent=2, allow_nan=False)
    write_text(path, text + "\n")
