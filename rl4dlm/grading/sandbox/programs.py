"""What a sandbox runs and what comes back: plain data on both sides.

Owns the vocabulary between those who grade programs and those who run them. A program is untrusted source with parts,
each of which asks it for something; a part's result is a value or the reason why there is none. Nothing here says
whether a value is right: expected values never reach a program's process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

# What messages begin with where a part has had its own time, and not too little since others took it.
OWN_TIME = ("it took longer than", "it used more than")


@dataclass(frozen=True)
class Call:
    """An expression over what the program defines, such as `f([1, 2], key=3)`; its value comes back as data."""

    expression: str


@dataclass(frozen=True)
class Check:
    """Statements of a problem's own tests, which raise where the program is wrong.

    They run in a process of their own, in which the functions that the program defines are stand-ins that send
    arguments to the program's process and bring values back as data. What cannot be sent (a class, a generator) makes
    them run inside the program's process, and the result says so (`Result.inside`).

    Attributes:
        source: the statements.
        names: what of the program they use; each is called as a function.
    """

    source: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Feed:
    """The program is run as a script with this on its standard input; what it prints comes back as text."""

    stdin: str


Part = Call | Check | Feed


@dataclass(frozen=True)
class Program:
    """Untrusted source and what is asked of it.

    Attributes:
        source: Python.
        parts: what is asked, in order; each sees the program as freshly loaded as far as memory goes: what one part
            does to the program's globals is not seen by another.
        setup: trusted statements that run before the source, such as imports.
    """

    source: str
    parts: tuple[Part, ...]
    setup: str = ""


class Result(NamedTuple):
    """What became of a part.

    Attributes:
        status: `value` (there is one), `error` (the program raised), `wrong` (a check raised AssertionError),
            `timeout`, `memory`, `output` (more than may be written), `data` (a value that is no data), `ended` (the
            process stopped without an answer), `syntax` (the source does not compile, or not in half a second of a
            processor), `budget` (the batch's time was over before it ran, and others had used it), or `lost` (the
            machine failed, not the program: such a part cannot be scored).
        value: of a call its value in plain data (None, bool, int, float, complex, str, bytes, list, tuple, set,
            frozenset, dict of these; subclasses come back as what they are made of), of a feed the text written to
            standard output, of a check True, or `uncalled` where it has asked nothing of the program.
        message: of an error its type and message, cut to 1,000 characters.
        inside: of a check whether it ran in the program's own process, where a program could tamper with it.
    """

    status: str
    value: Any = None
    message: str = ""
    inside: bool = False
