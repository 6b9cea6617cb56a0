"""How well a denoiser solves a task and at what price: solve rates with intervals, forwards, tokens per forward."""

from __future__ import annotations

from rl4dlm.evaluation.intervals import wilson_interval
from rl4dlm.evaluation.machine import machine, versions
from rl4dlm.evaluation.measure import evaluate
from rl4dlm.evaluation.pass_at import PassAt
from rl4dlm.evaluation.results import EvaluationResult, Measurement, write_results
from rl4dlm.tasks.prompts import encode_prompt

__all__ = [
    "EvaluationResult",
    "Measurement",
    "PassAt",
    "encode_prompt",
    "evaluate",
    "machine",
    "versions",
    "wilson_interval",
    "write_results",
]
