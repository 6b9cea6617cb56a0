"""Programs that a model wrote, run where they can hurt nothing.

`run_programs` is what rewards call; `programs` has the vocabulary, docs/sandbox.md what holds at which level. In the
trainer: `levels` (which level there is), `pool` (processes), `batch` (one call). In the server and below it: `server`,
`isolation` with `kernel`, `landlock` and `seccomp`, `job` (a program's keeper), `part` (its process), `remote` (calls
between tests and program). On both sides: `limits`, `data`, `frames`.
"""

from __future__ import annotations

from rl4dlm.grading.sandbox.levels import active_level, require_sandbox, run_programs, strongest_level
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.pool import SandboxError
from rl4dlm.grading.sandbox.programs import Call, Check, Feed, Part, Program, Result

__all__ = [
    "Call",
    "Check",
    "Feed",
    "Limits",
    "Part",
    "Program",
    "Result",
    "SandboxError",
    "active_level",
    "require_sandbox",
    "run_programs",
    "strongest_level",
]
