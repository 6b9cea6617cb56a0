r"""Countdown in a few characters: three small numbers, a line for each try, and the boxed expression.

Owns the generator and its worked answers; what is right is `countdown`'s to say. With 4,7,3=25, the prompt, goes

    4*3+7=19
    4*7-3=25
    \boxed{4*7-3}

and an end token, which a trainer adds. How many lines it takes is not known beforehand. The answer is read as in the
papers' task: of text behind the box nothing counts, and a box that never closes is no answer.

Splits are those of `countdown`: the same numbers, in any order, with the same target are in the same split in both.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from rl4dlm.grading.columns import as_integers
from rl4dlm.grading.expression import ExpressionError, evaluate
from rl4dlm.grading.text import working_lines
from rl4dlm.tasks import expressions
from rl4dlm.tasks.base import Row, Task, check_size, gather, split_of
from rl4dlm.tasks.countdown import instance_key, solves

_DEFAULT_SIZE = {"train": 20_000, "validation": 256, "test": 256}

_NUMBERS = 3
_MOST = 999  # of any value on the way, so that the length of a line is bounded
_MOST_DRAWS = 100  # for a try; three ones have few values


@dataclass(frozen=True)
class CountdownSmall(Task):
    """Rows `prompt` (numbers, target and a line break), `numbers` (list of int), `target` (int), `answer` (an
    expression) and `solution` (up to `max_tries` lines that miss the target, one that reaches it, and the box).

    The target is the value of a random expression of all three numbers, and all values on the way are natural. A
    tokenizer of single characters fits: with the defaults a prompt has at most 12 tokens and a solution 63, the end
    included; with `max_number=9, max_tries=0` it has at most 27, but then there are fewer than 256 instances to hold
    out, so `size` has to be given. Training rows are drawn independently: an instance may return with its numbers in
    another order, with other tries and another answer. Validation and test rows are distinct.

    Args:
        size: rows of a split; by default 20,000 for training, 256 for validation and test.
        seed: which rows are drawn. It moves no instance from one split to another.
        max_number: the numbers lie between 1 and this, at most 99.
        max_target: the target lies between 1 and this, at most 999.
        max_tries: most tries of a solution before the right one; their number is uniform.
        symbols: the operations of solutions, some of "+-*/". Any answer may use all four.
    """

    name: ClassVar[str] = "countdown_small"

    size: int | None = None
    seed: int = 0
    max_number: int = 20
    max_target: int = 99
    max_tries: int = 2
    symbols: str = "+-*/"

    def __post_init__(self) -> None:
        check_size(self.size)
        if not 2 <= self.max_number <= 99 or not 1 <= self.max_target <= _MOST:
            raise ValueError(
                f"max_number={self.max_number}, max_target={self.max_target}; they are 2 to 99 and 1 to {_MOST}"
            )
        if self.max_tries < 0:
            raise ValueError(f"max_tries={self.max_tries}; it is at least 0")
        expressions.check_symbols(self.symbols)

    def _rows(self, split: str) -> list[Row]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        seen: set[str] = set()

        def draw() -> Row | None:
            numbers = [rng.randint(1, self.max_number) for _ in range(_NUMBERS)]
            answer, target = self._expression(rng, numbers)
            key = instance_key(numbers, target)
            if not 1 <= target <= self.max_target or split_of(key) != split or (split != "train" and key in seen):
                return None
            seen.add(key)
            return {
                "prompt": f"{','.join(map(str, numbers))}={target}\n",
                "numbers": numbers,
                "target": target,
                "answer": answer,
                "solution": f"{self._tries(rng, numbers, target)}{answer}={target}\n\\boxed{{{answer}}}",
            }

        what = f"{split} instances of numbers up to {self.max_number} with a target up to {self.max_target}"
        return gather(draw, self.size or _DEFAULT_SIZE[split], what)

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer uses exactly the numbers and reaches the target; `None` without numbers or target."""
        return solves(completion, row.get("numbers"), row.get("target"))

    def _expression(self, rng: random.Random, numbers: list[int]) -> tuple[str, int]:
        """A random expression of the numbers, in any order, and its value; -1 where that is not natural."""
        expression = expressions.draw(rng, rng.sample(numbers, len(numbers)), self.symbols)
        value = expressions.value(expression, _MOST)
        return expressions.written(expression), -1 if value is None else value

    def _tries(self, rng: random.Random, numbers: list[int], target: int) -> str:
        """Lines with different expressions that miss the target, each with a line break."""
        lines: list[str] = []
        wanted = rng.randint(0, self.max_tries)
        for _ in range(_MOST_DRAWS * wanted):
            if len(lines) == wanted:
                break
            text, value = self._expression(rng, numbers)
            line = f"{text}={value}\n"
            if value not in (-1, target) and line not in lines:
                lines.append(line)
        return "".join(lines)


def tries_right(completion: str, numbers: Any) -> float | None:
    """The share of the lines before the answer that are tries, in [0, 1], 0 without any; `None` without numbers.

    A try is an expression of exactly the numbers, "=" and its value; the same line again is none.
    """
    given = as_integers(numbers)
    if given is None:
        return None
    wanted = Counter(map(Fraction, given))
    lines = working_lines(completion)
    return sum(_is_try(line, wanted) for line in set(lines)) / len(lines) if lines else 0.0


def _is_try(line: str, numbers: Counter[Fraction]) -> bool:
    left, _, right = line.partition("=")
    try:
        value, literals = evaluate(left)
        stated, parts = evaluate(right)
    except ExpressionError:
        return False
    return value == stated and len(parts) == 1 and Counter(literals) == numbers
