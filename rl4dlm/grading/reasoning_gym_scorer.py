"""The scorers of reasoning-gym, as a sandbox's server has them. Never imported by the process that trains.

Owns the call of a scorer, and that none of them executes an answer: some pass it to `eval`, or to sympy's `parse_expr`,
which does. Here `eval` reads literals, and `parse_expr` numbers, operators and the names of mathematics. What such a
scorer makes of an honest answer stays the same; what computes, or reaches into the interpreter, is no answer. The
sandbox's seal is the second line.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import sys
from collections.abc import Sequence
from types import CodeType
from typing import Any

import reasoning_gym
from sympy.parsing import sympy_parser

from rl4dlm.grading.sandbox.data import decode

_PARTICIPATION = 0.01
_NOTHING = "\N{EMPTY SET}"  # an answer that is never right
_LONGEST = 2000  # characters of an expression
_EXPRESSION = re.compile(r"[\w\s+\-*/^().,]*", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+")
_NAMES = frozenset((
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "abs", "pi", "oo", "Rational", "Integer", "Float", "Pow", "Mul", "Add",
))  # fmt: skip
_eval, _parse = builtins.eval, sympy_parser.parse_expr


def score(item: Sequence[Any]) -> float:
    """What a task's scorer gives for an answer, and 0 where it is no more than it gives for nothing.

    Some scorers pay 0.01 for any answer, some 0.05; that of `game_of_life_halting` pays 1 for whatever is not "True"
    where the right answer is "False". The answer that the entry states has what it has.

    Args:
        item: name of the task, its settings and the entry as `rl4dlm.grading.sandbox.data` writes them, the answer.
    """
    name, settings, entry, answer = item
    found, stated = float(_dataset(name, settings).score_answer(answer, decode(entry.encode()))), _stated(entry)
    if stated is not None and answer.strip().casefold() == stated.strip().casefold():
        return found
    return found if found > max(_PARTICIPATION, _for_nothing(name, settings, entry)) else 0.0


@functools.lru_cache(maxsize=256)
def _stated(entry: str) -> str | None:
    answer = decode(entry.encode())["answer"]
    return answer if isinstance(answer, str) else None


@functools.lru_cache(maxsize=256)
def _for_nothing(name: str, settings: str, entry: str) -> float:
    try:
        return float(_dataset(name, settings).score_answer(_NOTHING, decode(entry.encode())))
    except Exception:
        return 0.0


@functools.lru_cache(maxsize=8)
def _dataset(name: str, settings: str) -> Any:
    return reasoning_gym.create_dataset(name, **decode(settings.encode()), seed=0, size=1)


def _literal(source: Any, *scopes: Any) -> Any:
    """In the place of `eval`. Code is not made of answers: some library evaluates what it has compiled itself."""
    return _eval(source, *scopes) if isinstance(source, CodeType) else ast.literal_eval(source)


def _expression(text: Any, *arguments: Any, **named: Any) -> Any:
    """In the place of sympy's `parse_expr`."""
    plain = _NUMBER.sub("0 ", text) if isinstance(text, str) and len(text) <= _LONGEST else "."
    words = set(re.findall(r"[A-Za-z_]\w*", plain))
    if not _EXPRESSION.fullmatch(plain) or "." in plain or any(len(word) > 1 and word not in _NAMES for word in words):
        raise ValueError("this is no expression")
    return _parse(text, *arguments, **named)


def _harden() -> None:
    builtins.eval = _literal
    for module in list(sys.modules.values()):
        if getattr(module, "parse_expr", None) is _parse:
            vars(module)["parse_expr"] = _expression
    # sympy evaluates what has passed `_expression`; the other computes the value of its own problem, not of an answer.
    for name in ("sympy.parsing.sympy_parser", "reasoning_gym.arithmetic.bitwise_arithmetic"):
        if name in sys.modules:
            vars(sys.modules[name])["eval"] = _eval


_harden()
