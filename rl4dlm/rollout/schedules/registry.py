"""Names to schedules. A schedule is registered with its settings dataclass and a function that builds its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rl4dlm.rollout.schedules.parts import CanvasSchedule, Schedule

Builder = Callable[[Any, Any], Schedule | CanvasSchedule]
"""Takes the schedule's own arguments and the `DecodingConfig`, returns the parts."""


@dataclass(frozen=True)
class Entry:
    """One registered schedule."""

    arguments: type
    build: Builder
    takes_steps: bool
    noise: str
    fixed_forwards: bool


_entries: dict[str, Entry] = {}


def register(
    name: str, arguments: type, *, takes_steps: bool = True, noise: str = "mask", fixed_forwards: bool = False
) -> Callable[[Builder], Builder]:
    """Registers a schedule under a name.

    Args:
        name: what `DecodingConfig.schedule` calls it.
        arguments: dataclass of the settings it takes from `schedule_args`; its `__post_init__` validates them.
        takes_steps: whether the number of steps is given (`DecodingConfig.steps`) or follows from the logits.
        noise: the corruption that it undoes, as in `DiffusionSpec`.
        fixed_forwards: whether the number of forwards follows from the settings alone, whatever the model says, where
            nothing is given and rows do not stop early. Processes that share a sharded model then need not agree.

    Raises:
        ValueError: the name is taken.
    """

    def add(build: Builder) -> Builder:
        if name in _entries:
            raise ValueError(f"a schedule named {name!r} is registered already")
        _entries[name] = Entry(arguments, build, takes_steps, noise, fixed_forwards)
        return build

    return add


def lookup(name: str) -> Entry:
    """The entry of a name. Raises ValueError for an unknown one, listing what exists."""
    if name not in _entries:
        raise ValueError(f"schedule={name!r} is unknown; choose one of {', '.join(names())}")
    return _entries[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_entries)
