"""How well a denoiser solves a task and at what price: solve rates with intervals, forwards, tokens per forward."""

from __future__ import annotations

from rl4dlm.evaluation.intervals import wilson_interval
from rl4dlm.evaluation.machine import machine, versions
from rl4dlm.evaluation.measure import encode_prompt, evaluate
from rl4dlm.evaluation.results import EvaluationResult, Measurement, write_results

__all__ = [
    "EvaluationResult",
    "Measurement",
    "encode_prompt",
    "evaluate",
    "machine",
    "versions",
    "wilson_interval",
    "write_results",
]
