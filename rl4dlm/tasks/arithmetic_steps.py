r"""Arithmetic worked out line by line: the expression with one operation less in each line, then the boxed answer.

Owns the generator, the splits and the checkers of answers and of steps. With 7+2*3-4, the prompt, goes

    7+6-4
    13-4
    \boxed{9}

and an end token, which a trainer adds. The length depends on the operations, so a model has to end by itself. The
answer is read as GSM8K's is: of text behind the box nothing counts, and without a box only a number that stands alone
does.

Splits are by instance: the checksum of the canonical expression decides, so that 2+3*4 and 4*3+2 are in the same one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_integer, as_text
from rl4dlm.grading.expression import ExpressionError, evaluate
from rl4dlm.grading.text import read_number, working_lines
from rl4dlm.tasks import expressions
from rl4dlm.tasks.base import Row, Task, check_size, gather, split_of
from rl4dlm.tasks.expressions import Operation

_DEFAULT_SIZE = {"train": 20_000, "validation": 256, "test": 256}


@dataclass(frozen=True)
class ArithmeticSteps(Task):
    """Rows `prompt` (the expression and a line break), `expression`, `answer` (a number as text) and `solution` (the
    worked answer).

    All values on the way are natural numbers. A tokenizer of single characters fits: with the defaults a prompt has at
    most 21 tokens and a solution 44, the end included; with `max_operations=3` it has at most 28. Training rows are
    drawn independently, validation and test rows are distinct, however their sums and products are ordered.

    Args:
        size: rows of a split; by default 20,000 for training, 256 for validation and test.
        seed: which rows are drawn. It moves no expression from one split to another.
        min_operations: fewest operations, at least 2; their number is uniform.
        max_operations: most operations, at most 8.
        max_number: the numbers lie between 1 and this.
        max_value: no value on the way is larger.
        symbols: the operations, some of "+-*/". Divisions leave no remainder.
    """

    name: ClassVar[str] = "arithmetic_steps"

    size: int | None = None
    seed: int = 0
    min_operations: int = 2
    max_operations: int = 4
    max_number: int = 12
    max_value: int = 99
    symbols: str = "+-*"

    def __post_init__(self) -> None:
        check_size(self.size)
        if not 2 <= self.min_operations <= self.max_operations <= 8:
            raise ValueError(
                f"min_operations={self.min_operations}, max_operations={self.max_operations}; needed: "
                "2 <= min_operations <= max_operations <= 8"
            )
        if not 1 <= self.max_number <= self.max_value:
            raise ValueError(
                f"max_number={self.max_number}, max_value={self.max_value}; needed: 1 <= max_number <= max_value"
            )
        expressions.check_symbols(self.symbols)

    def _rows(self, split: str) -> list[Row]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        seen: set[str] = set()
        count = 0

        def draw() -> Row | None:
            nonlocal count
            # Drawn once for a row, not again for each miss: fewer of the long expressions stay within the bounds.
            count = count or rng.randint(self.min_operations, self.max_operations)
            numbers = [rng.randint(1, self.max_number) for _ in range(count + 1)]
            expression = expressions.draw(rng, numbers, self.symbols)
            answer = expressions.value(expression, self.max_value)
            if not isinstance(expression, Operation) or answer is None:
                return None
            key = expressions.canonical(expression)
            if split_of(f"{self.name}/{key}") != split or (split != "train" and key in seen):
                return None
            seen.add(key)
            count = 0
            text = expressions.written(expression)
            solution = f"{_worked(expression)}\\boxed{{{answer}}}"
            return {"prompt": f"{text}\n", "expression": text, "answer": str(answer), "solution": solution}

        what = (
            f"{split} expressions of {self.min_operations} to {self.max_operations} operations {self.symbols} "
            f"with numbers up to {self.max_number} and values up to {self.max_value}"
        )
        return gather(draw, self.size or _DEFAULT_SIZE[split], what)

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer is the expression's value; `None` without the column `answer`."""
        return solves(completion, row.get("answer"))


def solves(completion: str, answer: Any) -> bool | None:
    """Whether a completion answers with a number; `None` where it is no number. What is read is `read_number`'s."""
    wanted = as_integer(answer)
    return None if wanted is None else read_number(completion) == wanted


def steps_right(completion: str, expression: Any) -> float | None:
    """How much of the work is there, in [0, 1]; `None` where the expression is none, or has nothing to work out.

    A line before the answer is right if it is an expression of the same value with fewer operations than the right line
    before it, but at least one. That is the number of right lines over the number of lines, or over the number needed,
    where there are fewer: a line that is wrong, or repeats another, costs as much as one that is missing.
    """
    try:
        wanted, literals = evaluate(as_text(expression) or "")
    except ExpressionError:
        return None
    left = needed = len(literals) - 1
    if needed < 2:
        return None
    right, lines = 0, working_lines(completion)
    for line in lines:
        try:
            found, literals = evaluate(line)
        except ExpressionError:
            continue
        if found == wanted and 0 < len(literals) - 1 < left:
            left = len(literals) - 1
            right += 1
    return right / max(needed - 1, len(lines))


def _worked(operation: Operation) -> str:
    """The lines between an expression and its value, each with a line break."""
    lines, left = "", expressions.step(operation)
    while isinstance(left, Operation):
        lines += f"{expressions.written(left)}\n"
        left = expressions.step(left)
    return lines
