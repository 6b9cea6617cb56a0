"""How well a denoiser solves a task and at what price: solve rates with intervals, forwards, tokens per forward."""

from __future__ import annotations

from rl4dlm.evaluation.compare import Paired, compare, paired
from rl4dlm.evaluation.intervals import wilson_interval
from rl4dlm.evaluation.likelihood import LogLikelihoods, log_likelihood
from rl4dlm.evaluation.machine import machine, versions
from rl4dlm.evaluation.measure import completion_texts, evaluate
from rl4dlm.evaluation.pass_at import PassAt
from rl4dlm.evaluation.results import EvaluationResult, Measurement, read_results, write_results
from rl4dlm.evaluation.rewards import DatasetTask, Rewards
from rl4dlm.evaluation.speed import Speed, area, aup
from rl4dlm.tasks.prompts import encode_prompt

__all__ = [
    "DatasetTask",
    "EvaluationResult",
    "LogLikelihoods",
    "Measurement",
    "Paired",
    "PassAt",
    "Rewards",
    "Speed",
    "area",
    "aup",
    "compare",
    "completion_texts",
    "encode_prompt",
    "evaluate",
    "log_likelihood",
    "machine",
    "paired",
    "read_results",
    "versions",
    "wilson_interval",
    "write_results",
]
