"""Which problems to train on are also problems to evaluate on.

Owns the comparison of texts: words alone, in small letters, in runs. A problem is held to be the same as one of an
evaluation set where they share a run of words, or where the whole of a shorter text is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rl4dlm.grading.columns import as_text
from rl4dlm.tasks.code.sources import docstring_of
from rl4dlm.tasks.files import FORMATS, read_rows

OVERLAP = 10
"""Words of a run."""

_TEXTS = ("question_content", "text", "question", "prompt")
"""Columns of evaluation sets with a problem's text; the first of them that a row has is read."""


def words_of(text: str) -> list[str]:
    """The words and numbers of a text, in small letters, without signs."""
    return re.findall(r"[a-z0-9]+", text.lower())


class Held:
    """The texts of evaluation sets, and what is in them.

    Args:
        texts: of their problems.
        overlap: words of a run that two problems must not share.
    """

    def __init__(self, texts: Iterable[str], overlap: int = OVERLAP) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        self._overlap = overlap
        for text in texts:
            words = words_of(text)
            length = min(overlap, len(words))
            for run in _runs(words, length):
                self._runs.setdefault(length, set()).add(run)

    def has(self, text: str) -> bool:
        """Whether a problem's text shares a run with one of them."""
        words = words_of(text)
        return any(run in runs for length, runs in self._runs.items() for run in _runs(words, length))


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """The runs of so many words, without those of numbers alone."""
    if length:
        for start in range(len(words) - length + 1):
            run = tuple(words[start : start + length])
            if not all(word.isdigit() for word in run):
                yield run


def check_named(names: Sequence[str] | None, tasks: Sequence[str]) -> None:
    """Refuse what names neither one of these tasks nor a file that can be read."""
    if isinstance(names, str):
        raise ValueError(f"evaluation_sets={names!r}; give a list of names of tasks or files")
    for name in names or ():
        if name in tasks:
            continue
        if Path(name).suffix not in FORMATS:
            raise ValueError(
                f"evaluation_sets names {name!r}; give names of tasks ({', '.join(tasks)}) or files that end in "
                f"{', '.join(FORMATS)}"
            )
        if not Path(name).is_file():
            raise FileNotFoundError(f"evaluation_sets names {name!r}: there is no such file")


def texts_of(path: str) -> list[str]:
    """The problems' texts of a file in the columns of HumanEval, MBPP or LiveCodeBench.

    Raises:
        ValueError: a row has none of these columns.
    """
    return [text_of(row, path) for row in read_rows(Path(path))]


def text_of(row: dict[str, Any], source: str) -> str:
    """What a row asks: of a beginning of a program, as HumanEval has it, its docstring."""
    column = next((column for column in _TEXTS if as_text(row.get(column))), None)
    if column is None:
        raise ValueError(f"{source} has a row without {', '.join(_TEXTS)}; its columns: {', '.join(map(str, row))}")
    text = str(row[column])
    return docstring_of(text, str(row["entry_point"])) if row.get("entry_point") else text
