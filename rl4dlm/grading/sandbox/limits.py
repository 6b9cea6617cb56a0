"""How much a program may use: plain numbers, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What holds for one part of a program, unless it says otherwise.

    The folder that a program may write to exists at the level `namespaces` only; at `landlock` nothing may be written.

    Raises:
        ValueError: a limit that is not positive and finite.
    """

    seconds: float = 5.0  # on the wall clock, from loading the program on
    program_seconds: float = 30.0  # on the wall clock, of all parts of a program; in a full batch of all its turns
    timeouts: int = 2  # parts of a program that may run out of time before the rest counts as out of time, too
    cpu_seconds: float = 5.0  # of all threads together
    memory_bytes: int = 1 << 30  # address space
    threads: int = 32
    file_bytes: int = 8 << 20  # of a file, and of what is printed
    folder_bytes: int = 16 << 20
    open_files: int = 64
    output_bytes: int = 1 << 20  # of a program's answers, and of what a part prints; beyond it there is no value

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name}={value!r}; a limit must be positive and finite")
            if field.type == "int" and not isinstance(value, int):
                raise ValueError(f"{field.name}={value!r}; it must be a whole number")
