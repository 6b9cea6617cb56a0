"""Programs that a model wrote, run where they can hurt nothing."""

from __future__ import annotations

from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.pool import SandboxError, run_programs
from rl4dlm.grading.sandbox.programs import Call, Check, Feed, Part, Program, Result

__all__ = ["Call", "Check", "Feed", "Limits", "Part", "Program", "Result", "SandboxError", "run_programs"]
