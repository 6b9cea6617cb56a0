"""LiveCodeBench, problems of programming contests with their dates (arXiv 2403.07974), `code_generation_lite`.

Owns the reader, from the hub or files in the published columns, and the way to the private tests, which are published
as base64 of zlib of a pickle of a text. A pickle can run any code when it is loaded, so none is loaded here: the text
is read out of its operations, and a pickle that does anything but hold one text is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from rl4dlm.grading.code.problem import Problem
from rl4dlm.tasks.base import Row, check_size
from rl4dlm.tasks.code import prompts
from rl4dlm.tasks.code.base import CodeTask
from rl4dlm.tasks.files import files_by_split, read_rows

_RELEASES = tuple(f"release_v{number}" for number in range(1, 7))
_MOST_BYTES = 1 << 30  # of a row's tests

_SETUP = """from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string
import re
import datetime
import collections
import heapq
import bisect
import copy
import math
import random
import statistics
import itertools
import functools
import operator
import io
import sys
import json
sys.setrecursionlimit(50000)"""
"""What the benchmark's own runner imports before a program."""


@dataclass(frozen=True)
class LiveCodeBench(CodeTask):
    """Rows `prompt`, `problem`, `question`, `task_id`, `date` (of the contest, as text) and `difficulty`.

    Args:
        release: "release_v1" to "release_v6": the first file to that of the number; of a file in `path` all its rows.
        since, until: dates such as "2024-10-01", both inclusive; only problems of contests between them.
        difficulty: "easy", "medium" or "hard" alone.
        private_tests: whether private tests are read too; without them programs are judged by the examples of the
            problem's text, which is not the benchmark's number.
        size: at most this many rows, from the beginning.
        path: a folder with the published files `test.jsonl`, `test2.jsonl`, …, or one file of any format with the same
            columns. Without one, the hub.
        hub_id: dataset on the hub with these files.
    """

    name: ClassVar[str] = "livecodebench"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    release: str = "release_v6"
    since: str | None = None
    until: str | None = None
    difficulty: str | None = None
    private_tests: bool = True
    size: int | None = None
    path: str | Path | None = None
    hub_id: str = "livecodebench/code_generation_lite"

    def __post_init__(self) -> None:
        if self.release not in _RELEASES:
            raise ValueError(f"release={self.release!r}; the releases are {', '.join(_RELEASES)}")
        for option in ("since", "until"):
            _date(option, getattr(self, option))
        if self.since and self.until and _date("since", self.since) > _date("until", self.until):
            raise ValueError(f"since={self.since!r}, until={self.until!r}; since must not be later")
        if self.difficulty not in (None, "easy", "medium", "hard"):
            raise ValueError(f"difficulty={self.difficulty!r}; choose easy, medium, hard, or None for all")
        check_size(self.size)
        if self.path is not None and not Path(self.path).is_dir():
            files_by_split(self.path, self.splits)

    def _rows(self, split: str) -> list[Row]:
        rows = [row for file in self._files() for row in read_rows(file, "question_content", "public_test_cases")]
        first, last = _date("since", self.since), _date("until", self.until, date.max)
        made = []
        for row in rows:
            day = str(row.get("contest_date") or "")[:10]
            if (self.since or self.until) and not first <= _date("contest_date", day) <= last:
                continue
            if self.difficulty is None or row.get("difficulty") == self.difficulty:
                made.append(self._row(row, day))
            if len(made) == self.size:
                break
        if not made:
            raise ValueError(
                f"task {self.name!r} has no problem of {self.release} since {self.since}, until {self.until}, with "
                f"difficulty {self.difficulty}"
            )
        return made

    def _files(self) -> list[Path]:
        if self.path is not None and not Path(self.path).is_dir():
            return [Path(self.path)]
        names = ["test.jsonl", *(f"test{number}.jsonl" for number in range(2, len(_RELEASES) + 1))]
        names = names[: _RELEASES.index(self.release) + 1]
        if self.path is None:
            from huggingface_hub import hf_hub_download

            return [Path(hf_hub_download(self.hub_id, name, repo_type="dataset")) for name in names]
        missing = [name for name in names if not (Path(self.path) / name).is_file()]
        if missing:
            raise FileNotFoundError(f"path={str(self.path)!r} has no {missing[0]}, which {self.release} needs")
        return [Path(self.path) / name for name in names]

    def _row(self, row: dict[str, Any], day: str) -> Row:
        cases = _cases(row["public_test_cases"])
        if self.private_tests:
            cases += _cases(private_text(row["private_test_cases"]) if row.get("private_test_cases") else "[]")
        starter, metadata = row.get("starter_code") or "", row.get("metadata") or "{}"
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
        tests = tuple(_test(case, name) for case in cases)
        return {
            "prompt": prompts.livecodebench(row["question_content"], starter),
            "problem": Problem(tests, setup=_SETUP).to_json(),
            "question": row["question_content"],
            "task_id": str(row.get("question_id") or ""),
            "date": day,
            "difficulty": str(row.get("difficulty") or ""),
        }


def private_text(value: str) -> str:
    """The text of private tests: JSON as it is, or as it is published, base64 of zlib of a pickle of JSON.

    Raises:
        ValueError: it is neither, or the pickle holds anything but one text.
    """
    if value.lstrip().startswith("["):
        return value
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(value, validate=True), _MOST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"private_test_cases is neither JSON nor base64 of zlib: {error}") from None
    if unpacker.unconsumed_tail:
        raise ValueError(f"private_test_cases has more than {_MOST_BYTES:,} bytes")
    return pickled_text(pickled)


def pickled_text(pickled: bytes) -> str:
    """The text in a pickle of one `str`, which is not loaded: only operations that hold a text are allowed.

    Raises:
        ValueError: it holds something else, or more than one thing.
    """
    allowed = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
    texts = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
    found: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name in texts:
                found.append(str(argument))
            elif operation.name not in allowed:
                raise ValueError(f"it has the operation {operation.name}")
    except ValueError as error:
        raise ValueError(
            f"private_test_cases is a pickle of something else than a text, and is not loaded: {error}"
        ) from None
    if len(found) != 1:
        raise ValueError(f"private_test_cases is a pickle of {len(found)} texts; it must be one")
    return found[0]


def _cases(text: Any) -> list[dict[str, str]]:
    cases = json.loads(text) if isinstance(text, str) else text
    if not isinstance(cases, Sequence) or not all(isinstance(case, dict) for case in cases):
        raise ValueError(f"test cases are no list of objects: {text!s:.60}")
    return list(cases)


def _test(case: dict[str, str], name: str | None) -> dict[str, str]:
    """A test of standard input and output, or of a method: a line of JSON for each argument."""
    if case.get("testtype") != "functional":
        return {"stdin": case["input"], "stdout": case["output"]}
    if not name:
        raise ValueError("a functional test case needs func_name in the column metadata")
    arguments = ", ".join(repr(json.loads(line)) for line in case["input"].split("\n"))
    return {"call": f"Solution().{name}({arguments})", "expected": repr(json.loads(case["output"]))}


def _date(option: str, text: str | None, default: date = date.min) -> date:
    if text is None:
        return default
    try:
        return date.fromisoformat(text)
    except (ValueError, TypeError):
        raise ValueError(f"{option}={text!r}; give a date such as '2024-10-01'") from None
