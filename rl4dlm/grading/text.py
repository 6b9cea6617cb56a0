"""Reads completions and the answers in them.

Owns the two shapes in which completions arrive, the columns that come with them, and the places where an answer may
stand (`<answer>` tags, `\\boxed{}`, `####`). It does not judge answers. Every function takes time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

_OPEN, _CLOSE = "<answer>", "</answer>"
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?", re.ASCII)
_NUMBER_INSIDE = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", re.ASCII)
_BOX = re.compile(r"\\boxed(?: *\{| +(?P<token>[^\s${]+))")
_LONGEST_NUMBER = 64  # characters; an answer that is longer is not a number anybody asked for


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion, which TRL hands over as a string or as a list of chat messages.

    Raises:
        TypeError: a completion is neither.
    """
    return [_text(completion) for completion in completions]


def score_rows(
    reward: str,
    score: Callable[..., float | None],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any] | None],
) -> list[float | None]:
    """`score(text, *values)` for each completion, `None` where one of its columns is `None`: that row cannot be scored.

    Args:
        reward: name for error messages.
        completions: one per row, in either of TRL's shapes.
        columns: the dataset columns that the reward needs, each with one value per completion; `None` where the dataset
            has no such column.

    Raises:
        ValueError: a column is missing or of another length than `completions`.
    """
    texts = completion_texts(completions)
    given = [require_column(reward, name, values, len(texts)) for name, values in columns.items()]
    return [
        None if any(value is None for value in row) else score(text, *row)
        for text, *row in zip(texts, *given, strict=True)
    ]


def require_column(reward: str, name: str, values: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """A dataset column as a reward function gets it.

    Raises:
        ValueError: the dataset has no such column, or it has other than `count` values.
    """
    if values is None:
        raise ValueError(f"reward {reward!r} needs the dataset column {name!r}, which the dataset does not have")
    if len(values) != count:
        raise ValueError(f"reward {reward!r}: the column {name!r} has {len(values)} values for {count} completions")
    return values


def total(*terms: Sequence[float | None]) -> list[float | None]:
    """The sum of several rewards row by row; `None` where one of them is."""
    return [
        None if any(value is None for value in row) else sum(value for value in row if value is not None)
        for row in zip(*terms, strict=True)
    ]


def answer_blocks(text: str) -> Iterator[str]:
    """What stands between each `<answer>` and the first `</answer>` after it, unstripped, in order, not overlapping."""
    start = 0
    while (opened := text.find(_OPEN, start)) >= 0:
        opened += len(_OPEN)
        closed = text.find(_CLOSE, opened)
        if closed < 0:
            return
        yield text[opened:closed]
        start = closed + len(_CLOSE)


def last_answer_block(text: str) -> str | None:
    """The last complete `<answer>...</answer>`, stripped; `None` where there is none."""
    blocks = list(answer_blocks(text))
    return blocks[-1].strip() if blocks else None


def answer_or_text(text: str) -> str:
    """What follows the last `<answer>` up to the next `</answer>`, stripped. Both tags may be missing.

    d1 (arXiv 2504.12216) reads GSM8K answers in this way.
    """
    return text.rpartition(_OPEN)[2].partition(_CLOSE)[0].strip()


def hash_answer(text: str) -> str | None:
    """What follows the first `####`, where GSM8K's solutions state their answer; `None` without it."""
    pieces = text.split("####", 2)
    return pieces[1].strip() if len(pieces) > 1 else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` that closes; `\boxed 5` is read up to the next white space or `$`."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in re.finditer("[{}]", text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    content = None
    for box in _BOX.finditer(text):
        if box["token"]:
            content = box["token"]
        elif box.end() - 1 in closing:
            content = text[box.end() : closing[box.end() - 1]].strip() or content  # an empty box is only talked about
    return content


def working_lines(text: str) -> list[str]:
    r"""The lines before the first that opens a box or an `<answer>`, stripped, without empty ones; all without any."""
    starts = [start for start in (text.find(r"\boxed"), text.find(_OPEN)) if start >= 0]
    before = text[: text.rfind("\n", 0, min(starts)) + 1] if starts else text
    return [line.strip() for line in before.splitlines() if line.strip()]


def parse_number(text: str) -> Fraction | None:
    r"""The number that the whole text is, exactly; `None` where it is anything else.

    A dollar sign before it, a percent sign or a full stop after it, thousands commas and one `\boxed{}` around it are
    allowed.
    """
    boxed = last_boxed(text) if text.lstrip().startswith(r"\boxed") else None
    text = (text if boxed is None else boxed).strip().replace(r"\$", "$").replace(r"\%", "%").replace(r"\!", "")
    sign, text = ("-", text[1:]) if text.startswith("-$") else ("", text)
    text = sign + text.removeprefix("$").removesuffix(".").removesuffix("%").strip()
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text) or not any(char.isdigit() for char in text):
        return None
    return Fraction(text.replace(",", ""))


def read_number(completion: str) -> Fraction | None:
    r"""The number that a completion answers with; `None` without one.

    Read are what follows the last `<answer>`, or the whole text without one; in it the last `\boxed{}`; and of that the
    number it is, or the only number in it. Of several numbers none is chosen, since a list of guesses is no answer.
    """
    text = answer_or_text(completion)
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    number = parse_number(text.strip().removeprefix("$").removesuffix("$"))
    if number is not None:
        return number
    return last_number(text) if len(_NUMBER_INSIDE.findall(text)) == 1 else None


def last_number(text: str) -> Fraction | None:
    """The last number in a text, `None` without one."""
    numbers = _NUMBER_INSIDE.findall(text)
    return parse_number(numbers[-1]) if numbers else None


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        return "".join(message.get("content") or "" for message in completion)
    raise TypeError(f"a completion is a string or a list of chat messages, got {type(completion).__name__}")
