r"""Small functions to write: what one does is said in a few words, and tests say whether a program does it.

Owns the generator, its splits, tests and worked programs. With `f(text): reverse, then append a`, the prompt, goes

    def f(text):
        text = text[::-1]
        return text + 'a'

or `return text[::-1] + 'a'`, and an end token, which a trainer adds. There are several right programs for each prompt,
and they differ in length, so a model has to decide on one and to end by itself. Expected values are those of
`rl4dlm.tasks.code.operations`; no program is asked what is right.

Splits are by what a function does: two descriptions with the same values on fixed inputs are in the same split, such as
"add 2, then add 3" and "add 5".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from rl4dlm.grading.code.problem import Problem
from rl4dlm.tasks.base import Row, check_size, gather, split_of
from rl4dlm.tasks.code.base import CodeTask
from rl4dlm.tasks.code.operations import KINDS, Step, draw_steps, draw_value, value_of, written

_DEFAULT_SIZE = {"train": 4_000, "validation": 256, "test": 256}
_PROBES = 24  # inputs that say which function it is
_DRAWS = 50  # of inputs for tests, before an instance is given up


@dataclass(frozen=True)
class CodeMini(CodeTask):
    """Rows `prompt` (the description and a line break), `problem` (tests, see `Problem`), `level` (int) and `solution`
    (a right program, one of several).

    A description has `level` operations, none of which may be left out; tests tell the function from those with one
    operation less. A tokenizer of words and characters fits, see `benchmarks/code_mini.py`. Training rows are drawn
    independently: a function may return with another program and other tests. Validation and test rows are different
    functions.

    Args:
        size: rows of a split; by default 4,000 for training, 256 for validation and test.
        seed: which rows are drawn. It moves no function from one split to another.
        kinds: what functions take: some of "text" (a text), "items" (a list of numbers) and "n" (a number).
        min_level: fewest operations. In training rows their number is uniform; there are few held-out functions of one.
        max_level: most operations, at most 4.
        tests: of each row.
    """

    name: ClassVar[str] = "code_mini"

    size: int | None = None
    seed: int = 0
    kinds: Sequence[str] = KINDS
    min_level: int = 1
    max_level: int = 2
    tests: int = 6

    def __post_init__(self) -> None:
        check_size(self.size)
        kinds = () if isinstance(self.kinds, str) else self.kinds
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds={self.kinds!r}; give a list of some of {', '.join(KINDS)}, each once")
        if not 1 <= self.min_level <= self.max_level <= 4:
            raise ValueError(
                f"min_level={self.min_level}, max_level={self.max_level}; needed: 1 <= min_level <= max_level <= 4"
            )
        if not 2 <= self.tests <= 50:
            raise ValueError(f"tests={self.tests}; a row has 2 to 50 tests")

    def _rows(self, split: str) -> list[Row]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        keys: dict[str, str | None] = {}
        seen: set[str] = set()
        level, kind = 0, ""

        def draw() -> Row | None:
            nonlocal level, kind
            # Of training rows drawn once, not again for each miss, so that all kinds and levels are as frequent. There
            # are too few short descriptions for the others, which are all different.
            if split != "train" or not level:
                level, kind = rng.randint(self.min_level, self.max_level), rng.choice(list(self.kinds))
            steps = draw_steps(rng, kind, level)
            prompt = f"f({kind}): {', then '.join(step.phrase for step in steps)}\n"
            if prompt not in keys:
                keys[prompt] = None if _idle(steps, kind) else behaviour(steps, kind)
            key = keys[prompt]
            if key is None or split_of(key) != split or (split != "train" and key in seen):
                return None
            inputs = self._inputs(rng, steps, kind)
            if inputs is None:
                return None
            tests = tuple({"call": f"f({value!r})", "expected": repr(value_of(steps, value))} for value in inputs)
            row = {
                "prompt": prompt,
                "problem": Problem(tests, entry_point="f").to_json(),
                "level": level,
                "solution": written(steps, kind, rng),
            }
            seen.add(key)
            level = 0
            return row

        what = f"{split} functions of {self.min_level} to {self.max_level} operations on {', '.join(self.kinds)}"
        return gather(draw, self.size or _DEFAULT_SIZE[split], what)

    def _inputs(self, rng: random.Random, steps: Sequence[Step], kind: str) -> list[Any] | None:
        """Different inputs on which a function with any one operation less does something else; None: none found."""
        for _ in range(_DRAWS):
            inputs: list[Any] = []
            while len(inputs) < self.tests:
                value = draw_value(rng, kind)
                if value not in inputs:
                    inputs.append(value)
            wanted = [value_of(steps, value) for value in inputs]
            if all([value_of(less, value) for value in inputs] != wanted for less in _shorter(steps, kind)):
                return inputs
        return None


def behaviour(steps: Sequence[Step], kind: str) -> str:
    """What a function is: its values on fixed inputs, as text."""
    return f"code_mini/{kind}/{[value_of(steps, value) for value in _probes(kind)]}"


@cache
def _probes(kind: str) -> tuple[Any, ...]:
    rng = random.Random(f"code_mini/probes/{kind}")
    return tuple(draw_value(rng, kind) for _ in range(_PROBES))


def _idle(steps: Sequence[Step], kind: str) -> bool:
    """Whether an operation may be left out, or the function returns what it is given, or always the same."""
    own = behaviour(steps, kind)
    values = [value_of(steps, value) for value in _probes(kind)]
    if own == behaviour([], kind) or all(value == values[0] for value in values):
        return True
    return any(own == behaviour(less, kind) for less in _shorter(steps, kind))


def _shorter(steps: Sequence[Step], kind: str) -> list[list[Step]]:
    """The chains with one operation less, where what is left fits together."""
    found = []
    for number in range(len(steps)):
        less = [*steps[:number], *steps[number + 1 :]]
        given = [kind, *(step.operation.gives for step in less)]
        if all(step.operation.takes == before for step, before in zip(less, given, strict=False)):
            found.append(less)
    return found
