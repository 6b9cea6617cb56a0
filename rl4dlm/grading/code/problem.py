"""What a program has to do, as a row of a dataset says it.

Owns the form in which tests of programs are kept: one text column of JSON, the same for every dataset, which readers in
`rl4dlm.tasks.code` write and the rewards read. How a program is judged by it is in `rl4dlm.grading.code.verdicts`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Tests of a program.

    Attributes:
        tests: each one a dict of strings with the keys of one kind: `{"call", "expected"}` (an expression over what the
            program defines, and a Python literal), `{"source"}` (statements that raise where the program is wrong, such
            as `assert f(2) == 4`, or a whole test function with its call), or `{"stdin", "stdout"}` (the program is a
            script). Calls and scripts may have a `"tolerance"` for floats, such as "1e-6".
        entry_point: name of the function that the tests call; None where there is none, or several.
        setup: trusted statements that run before the program: imports and helpers of the prompt.
        prefix: the beginning of the program that the prompt shows, such as a signature with its docstring; a completion
            that does not repeat it goes on from it.
    """

    tests: tuple[dict[str, str], ...]
    entry_point: str | None = None
    setup: str = ""
    prefix: str = ""

    def to_json(self) -> str:
        """The text of a dataset's column `problem`."""
        fields: dict[str, Any] = {"tests": list(self.tests)}
        fields |= {name: getattr(self, name) for name in ("entry_point", "setup", "prefix") if getattr(self, name)}
        return json.dumps(fields)
