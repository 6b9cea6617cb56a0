"""Tasks: what a model is asked, and whether it answered.

Owns the list of tasks and their construction by name. Rewards, which may shape what they pay for, are plugins in
rewards/.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from rl4dlm.tasks.base import Task

__all__ = ["Task", "available_tasks", "load_task"]

_CLASSES = {
    "countdown": "rl4dlm.tasks.countdown:Countdown",
    "few_clue_sudoku": "rl4dlm.tasks.few_clue_sudoku:FewClueSudoku",
    "gsm8k": "rl4dlm.tasks.gsm8k:GSM8K",
    "math": "rl4dlm.tasks.math:Math",
    "sudoku": "rl4dlm.tasks.sudoku:Sudoku",
}


def available_tasks() -> list[str]:
    """The names that `load_task` knows."""
    return sorted(_CLASSES)


def load_task(name: str, **options: Any) -> Task:
    """A task by name. Its options are the fields of its class, for example `load_task("countdown", size=1000, seed=1)`.

    Raises:
        ValueError: an unknown name, an option the task does not have, or a value it does not allow.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(available_tasks())}")
    module, _, class_name = _CLASSES[name].partition(":")
    task_class = getattr(import_module(module), class_name)
    known = [field.name for field in fields(task_class)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"task {name!r} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known)}"
        )
    task: Task = task_class(**options)
    return task
