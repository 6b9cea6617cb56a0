"""Knights and Knaves: who tells the truth and who lies (arXiv 2410.23123).

Owns the reader, from the hub or a file, the prompt, and the checker. The prompt is ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.text import last_answer_block
from rl4dlm.tasks.base import Row, Task, check_size
from rl4dlm.tasks.files import Paths, check_held_out, files_by_split, read_hub, read_rows, with_validation

_ASK = (
    "\n\nThink step by step. Then say what everyone is, one person a line, in this format:\n<answer>\n"
    "NAME is a knight\nNAME is a knave\n</answer>"
)
_CONCLUSION = re.compile(r"conclusion\s*:?", re.IGNORECASE)


@dataclass(frozen=True)
class KnightsAndKnaves(Task):
    """Rows `prompt` (chat messages), `quiz`, `names` and `knights` (for each name whether it tells the truth).

    Args:
        people: in a puzzle, 2 to 8.
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with columns `quiz`, `names` and `solution` (truth values in the order
            of the names) for the test split, or a mapping from splits to files. Splits without a file are the hub's.
        validation_size: rows at the end of the training split that are the validation split instead, where `path` names
            no file for it.
        hub_id: dataset on the hub with the same columns.
    """

    name: ClassVar[str] = "knights_and_knaves"

    people: int = 3
    size: int | None = None
    path: Paths = None
    validation_size: int = 0
    hub_id: str = "K-and-K/knights-and-knaves"

    def __post_init__(self) -> None:
        if isinstance(self.people, bool) or not isinstance(self.people, int) or not 2 <= self.people <= 8:
            raise ValueError(f"people={self.people!r}; a whole number from 2 to 8 is needed")
        check_size(self.size)
        check_held_out(self.validation_size)
        files_by_split(self.path, self.splits)

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)

        def read(split: str) -> list[Row]:
            if split in files:
                return read_rows(files[split], "quiz", "names", "solution")
            return read_hub(self.hub_id, split, f"{self.people}ppl")

        rows = []
        for row in with_validation(self.name, read, split, files, self.validation_size)[: self.size]:
            names, knights = _listed(row["names"]), [_is_true(value) for value in _listed(row["solution"])]
            if len(names) != len(knights) or not names:
                raise ValueError(f"names={names!r}, solution={knights!r}; there must be one truth value for each name")
            prompt = [{"role": "user", "content": row["quiz"] + _ASK}]
            rows.append({"prompt": prompt, "quiz": row["quiz"], "names": names, "knights": knights})
        return rows

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether everyone is said to be what they are, and nobody to be both; `None` if the row says too little.

        Read is the last `<answer>`; without one what follows the last `CONCLUSION`, or else the whole text.
        """
        names, knights = row.get("names"), row.get("knights")
        if not names or not knights or len(names) != len(knights):
            return None
        text = last_answer_block(completion)
        if text is None:
            text = _CONCLUSION.split(completion)[-1]

        def said_of(name: str) -> set[str]:
            found = re.findall(rf"\b{re.escape(name)}\s+is\s+an?\s+(knight|knave)\b", text, re.IGNORECASE)
            return {kind.lower() for kind in found}

        return all(said_of(name) == {"knight" if true else "knave"} for name, true in zip(names, knights, strict=True))


def _listed(value: Any) -> list[Any]:
    """A list, also where a CSV file has it as JSON or as Python writes it."""
    if isinstance(value, str):
        value = json.loads(value.replace("'", '"').replace("True", "true").replace("False", "false"))
    return list(value)


def _is_true(value: Any) -> bool:
    if value in (True, False):
        return bool(value)
    raise ValueError(f"solution has {value!r}; truth values are needed")
