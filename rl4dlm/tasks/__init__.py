"""Tasks: what a model is asked, and whether it answered.

Owns the list of tasks and their construction by name, in every place that takes one: trainers, `rl4dlm eval` and
`rl4dlm decode`. A task of one's own is a `Task` subclass named as rewards are, see `rl4dlm.plugins`: by
`path/to/file.py:Class` (or the file alone, where it defines one task), by `package.module:Class`, or by an entry point
of the group `rl4dlm.tasks`. `reasoning_gym:NAME` is a task of the package reasoning-gym. Rewards, which may shape what
they pay for, are plugins in rewards/.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from rl4dlm import plugins
from rl4dlm.tasks.base import Task

__all__ = ["Task", "available_tasks", "load_task"]

ENTRY_POINT_GROUP = "rl4dlm.tasks"

_CLASSES = {
    "acecode": "rl4dlm.tasks.code.acecode:AceCode",
    "aime": "rl4dlm.tasks.aime:AIME",
    "arc": "rl4dlm.tasks.choices:ARC",
    "arithmetic_steps": "rl4dlm.tasks.arithmetic_steps:ArithmeticSteps",
    "code_mini": "rl4dlm.tasks.code.mini:CodeMini",
    "countdown": "rl4dlm.tasks.countdown:Countdown",
    "countdown_small": "rl4dlm.tasks.countdown_small:CountdownSmall",
    "few_clue_sudoku": "rl4dlm.tasks.few_clue_sudoku:FewClueSudoku",
    "gpqa": "rl4dlm.tasks.choices:GPQA",
    "gsm8k": "rl4dlm.tasks.gsm8k:GSM8K",
    "humaneval": "rl4dlm.tasks.code.humaneval:HumanEval",
    "humaneval_plus": "rl4dlm.tasks.code.humaneval:HumanEvalPlus",
    "knights_and_knaves": "rl4dlm.tasks.knights_and_knaves:KnightsAndKnaves",
    "kodcode": "rl4dlm.tasks.code.kodcode:KodCode",
    "livecodebench": "rl4dlm.tasks.code.livecodebench:LiveCodeBench",
    "math": "rl4dlm.tasks.math:Math",
    "mbpp": "rl4dlm.tasks.code.mbpp:MBPP",
    "mbpp_plus": "rl4dlm.tasks.code.mbpp:MBPPPlus",
    "sudoku": "rl4dlm.tasks.sudoku:Sudoku",
}

_GYM = "reasoning_gym"  # whose tasks are named `reasoning_gym:NAME`


def available_tasks() -> list[str]:
    """What `load_task` knows by name alone: the library's tasks, then entry points. Imports none.

    Those of reasoning-gym, `reasoning_gym:NAME`, are not among them: which there are only that package knows.
    """
    return sorted({*_CLASSES, *(entry_point.name for entry_point in _entries())})


def load_task(name: str, **options: Any) -> Task:
    """A task by name. Its options are the fields of its class, for example `load_task("countdown", size=1000, seed=1)`.

    Args:
        name: see above.
        options: of a class that is a dataclass its fields, of another one what its `__init__` takes.

    Raises:
        TypeError: `name` is not a string.
        ValueError: an unknown name, something that is no task, an option the task does not have, or a value it does
            not allow.
        FileNotFoundError: the file of a `path/to/file.py` does not exist.
        ImportError: a task of reasoning-gym, which is not installed.
    """
    if isinstance(name, str) and name.startswith(f"{_GYM}:"):
        gym = import_module("rl4dlm.tasks.reasoning_gym")
        task_class = gym.reasoning_gym_task(name.removeprefix(f"{_GYM}:"))
    elif name in _CLASSES:
        module, _, class_name = _CLASSES[name].partition(":")
        task_class = getattr(import_module(module), class_name)
    else:
        kind = plugins.Kind(
            noun="task",
            thing="Class",
            entries=_entries,
            files={},
            known=available_tasks,
            default=_only_task,
        )
        task_class = plugins.find(name, kind)
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise ValueError(f"{name!r} is {task_class!r}, which is no subclass of rl4dlm.tasks.Task")
    lacking = ", ".join(sorted(getattr(task_class, "__abstractmethods__", ())))
    if lacking:
        raise ValueError(f"task {name!r}: {task_class.__name__} does not define {lacking}")
    known = _options(task_class)
    unknown = sorted(set(options) - set(known)) if known is not None else []
    if unknown:
        raise ValueError(
            f"task {name!r} has no option {', '.join(map(repr, unknown))}; its options: "
            f"{', '.join(known or ()) or 'none'}{plugins.did_you_mean(unknown[0], known or ())}"
        )
    task: Task = task_class(**options)
    return task


def _entries() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=ENTRY_POINT_GROUP)


def _options(task_class: Any) -> list[str] | None:
    """Names of what a task can be given; None: anything."""
    if is_dataclass(task_class):
        return [field.name for field in fields(task_class) if field.init]
    parameters = [] if task_class.__init__ is object.__init__ else inspect.signature(task_class).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _only_task(module: ModuleType, path: Path) -> str:
    """The one task that a file defines."""
    found = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{path} defines {', '.join(found) or 'no task'}; name one task, as {path}:Class")
    return found[0]
