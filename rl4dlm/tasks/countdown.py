"""Countdown: reach a target with + - * / from given numbers, each used once.

Owns the generator, the reader of d1's test file (arXiv 2504.12216), the split and the checker. Splits are by instance:
the checksum of the sorted numbers and the target decides, so the same numbers in another order stay in their split.
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rl4dlm.grading.columns import as_integer, as_integers
from rl4dlm.grading.expression import ExpressionError, evaluate
from rl4dlm.grading.text import answer_blocks, answer_or_text, last_boxed
from rl4dlm.tasks import prompts
from rl4dlm.tasks.base import Row, Task, check_size, check_style, gather, split_of
from rl4dlm.tasks.files import Paths, files_by_split, read_rows

_DEFAULT_SIZE = {"train": 10_000, "validation": 256, "test": 256}

_OPERATION = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

# How a model may write an operator; d1's evaluation reads the first three so.
_SPELLINGS = {
    r"\left": "", r"\right": "", r"\(": "", r"\)": "", r"\[": "", r"\]": "", "⋅": "*", "∙": "*", "∗": "*", "✕": "*",
    "∕": "/", "⁄": "/", "–": "-", "﹣": "-", "－": "-", "＋": "+", r"\,": "", r"\!": "", r"\;": "", r"\ ": "",
    r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "$": "",
}  # fmt: skip


@dataclass(frozen=True)
class Countdown(Task):
    """Rows `prompt` (chat messages), `numbers` (list of int), `target` (int) and `solution` (an expression, "" from a
    file).

    Generated instances are distinct and can be solved: the target is the value of a random expression of all the
    numbers.

    Args:
        style: of the prompt: "d1", "spg" (the same) or "espo"; see `rl4dlm.tasks.prompts`.
        size: rows of a split; by default 10,000 for training, 256 for validation and test, and a whole file.
        seed: which instances are drawn. It moves no instance from one split to another.
        path: a CSV, JSON, JSONL or parquet file for the test split, or a mapping from splits to files, with rows
            `{"input": "30,100,93", "output": "23"}` (d1's test file) or `{"nums": [30, 100, 93], "target": 23}`. Splits
            without a file are generated, and leave out the instances of the files.
        numbers: how many numbers a generated instance has.
        max_number: they lie between 1 and this.
        max_target: the target lies between 1 and this.
    """

    name: ClassVar[str] = "countdown"

    style: str = "d1"
    size: int | None = None
    seed: int = 0
    path: Paths = None
    numbers: int = 3
    max_number: int = 100
    max_target: int = 100

    def __post_init__(self) -> None:
        check_style(self.style, prompts.STYLES)
        check_size(self.size)
        files_by_split(self.path, self.splits)
        if not 2 <= self.numbers <= 8:
            raise ValueError(f"numbers={self.numbers}; an instance has 2 to 8 numbers")
        if self.max_number < 2 or self.max_target < 1:
            raise ValueError(
                f"max_number={self.max_number}, max_target={self.max_target}; they are at least 2 and at least 1"
            )

    def _rows(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)
        if split in files:
            instances = _read(files[split])[: self.size]
        else:
            instances = self._generate(split, {i.key for file in files.values() for i in _read(file)})
        return [
            {
                "prompt": prompts.countdown(numbers, target, style=self.style, evaluation=split != "train"),
                "numbers": numbers,
                "target": target,
                "solution": solution,
            }
            for numbers, target, solution in instances
        ]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer uses exactly the numbers and reaches the target; `None` without numbers or target.

        The answer is what `read_answer` reads.
        """
        return solves(completion, row.get("numbers"), row.get("target"))

    def _generate(self, split: str, taken: set[str]) -> list[_Instance]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")

        def draw() -> _Instance | None:
            instance = self._draw(rng)
            if instance is None or instance.key in taken or split_of(instance.key) != split:
                return None
            taken.add(instance.key)
            return instance

        what = (
            f"{split} instances of {self.numbers} numbers up to {self.max_number} with a target up to {self.max_target}"
        )
        return gather(draw, self.size or _DEFAULT_SIZE[split], what)

    def _draw(self, rng: random.Random) -> _Instance | None:
        """A random expression over random numbers, if its value may be a target."""
        numbers = [rng.randint(1, self.max_number) for _ in range(self.numbers)]
        parts = [(Fraction(number), str(number)) for number in numbers]
        while len(parts) > 1:
            left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            symbol = rng.choice("+-*/")
            if symbol == "/" and right[0] == 0:
                return None
            parts.append((_OPERATION[symbol](left[0], right[0]), f"({left[1]}{symbol}{right[1]})"))
        value, text = parts[0]
        if value.denominator != 1 or not 1 <= value <= self.max_target:
            return None
        return _Instance(numbers, int(value), text[1:-1])


def solves(completion: str, numbers: Any, target: Any) -> bool | None:
    """Whether a completion's answer reaches the target with exactly the numbers; `None` where either is missing."""
    given, wanted = as_integers(numbers), as_integer(target)
    if given is None or wanted is None:
        return None
    answer = read_answer(completion)
    return answer is not None and judge(answer, given, wanted).solved


class Judgement(NamedTuple):
    """What an answer is: whether it uses exactly the given numbers, and whether it also reaches the target."""

    numbers_right: bool
    solved: bool


def judge(answer: str, numbers: Sequence[int], target: int) -> Judgement:
    r"""Judge an expression, in exact arithmetic.

    A `\boxed{}` around it, LaTeX and Unicode operators, and one `= value` after it are read as d1's evaluation reads
    them.
    """
    boxed = last_boxed(answer)
    text = answer if boxed is None else boxed
    for spelling, symbol in _SPELLINGS.items():
        text = text.replace(spelling, symbol)
    left, equals, right = text.partition("=")
    try:
        value, literals = evaluate(left)
        if equals:
            evaluate(right)
    except ExpressionError:
        return Judgement(False, False)
    numbers_right = Counter(literals) == Counter(Fraction(number) for number in numbers)
    return Judgement(numbers_right, numbers_right and value == target)


class _Instance(NamedTuple):
    numbers: list[int]
    target: int
    solution: str

    @property
    def key(self) -> str:
        return instance_key(self.numbers, self.target)


def instance_key(numbers: Sequence[int], target: int) -> str:
    """What `rl4dlm.tasks.base.split_of` takes for an instance, the same in every order of its numbers."""
    return f"{','.join(map(str, sorted(numbers)))}={target}"


def _read(file: Path) -> list[_Instance]:
    instances = []
    for number, row in enumerate(read_rows(file), start=1):
        try:
            if "input" in row:
                instance = _Instance([int(part) for part in row["input"].split(",")], int(row["output"]), "")
            else:
                instance = _Instance([int(part) for part in row["nums"]], int(row["target"]), "")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f'{file}: row {number} is neither {{"input": "1,2,3", "output": "6"}} nor '
                f'{{"nums": [1, 2, 3], "target": 6}}: {row}'
            ) from error
        instances.append(instance)
    return instances


def read_answer(completion: str) -> str | None:
    r"""The final answer: the last `<answer>...</answer>` with something in it; without one, what follows an `<answer>`
    that never closes; else the last `\\boxed{}`; `None` without any. Reward and checker read the same."""
    blocks = [block.strip() for block in answer_blocks(completion) if block.strip()]
    if blocks:
        return blocks[-1]
    if "<answer>" in completion:
        return answer_or_text(completion)
    return last_boxed(completion)
