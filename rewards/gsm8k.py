"""Rewards for GSM8K: the five terms of d1 (arXiv 2504.12216), one function each, and their sum.

A completion should read

    <reasoning>
    ...
    </reasoning>
    <answer>
    42
    </answer>

Functions ending in `_compat` are d1's own, with which its numbers were made: no term's pattern crosses a line break
where its regular expression has no DOTALL, so soft and strict format exclude each other and the sum is at most 3.5. The
others do what the terms are named for; their sum is at most 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.text import answer_or_text, completion_texts, parse_number, read_number, score_rows, total
from rl4dlm.tasks.gsm8k import gold_number

_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_STRICT = r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>"


def gsm8k(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """The sum of the five terms. Needs the column `answer`, the number to be found."""
    return total(
        tag_count(prompts, completions),
        soft_format(prompts, completions),
        strict_format(prompts, completions),
        integer(prompts, completions),
        correctness(prompts, completions, answer),
    )


def tag_count(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """0.125 for each of the four tags that has exactly one line to itself, less 0.001 per character after the last."""
    return [_tag_count(text) for text in completion_texts(completions)]


def soft_format(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """0.5 if the completion begins with the two tagged parts in order, whatever the line breaks."""
    return [0.5 if _soft(text.lstrip()) else 0.0 for text in completion_texts(completions)]


def strict_format(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """0.5 if the completion is exactly the two tagged parts, each tag on a line of its own; white space may follow."""
    return [0.5 if _strict(text.rstrip()) else 0.0 for text in completion_texts(completions)]


def integer(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """0.5 if the answer is a whole number, read as `correctness` reads it: a sign and thousands commas are allowed."""
    numbers = [parse_number(answer_or_text(text)) for text in completion_texts(completions)]
    return [0.5 if number is not None and number.denominator == 1 else 0.0 for number in numbers]


def correctness(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """2 if the answer is numerically equal to the column `answer`, else 0; `None` where the column is no number."""
    return score_rows("gsm8k:correctness", _correctness, completions, {"answer": answer})


def gsm8k_compat(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """The sum of d1's five terms."""
    return total(
        tag_count_compat(prompts, completions),
        soft_format_compat(prompts, completions),
        strict_format_compat(prompts, completions),
        integer_compat(prompts, completions),
        correctness_compat(prompts, completions, answer),
    )


def tag_count_compat(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """d1's xmlcount: 0.125 for each tag found once with its line breaks; text after the answer is punished twice.

    The first penalty takes the whole text for what comes after the answer if no line break follows `</answer>`.
    """
    return [_tag_count_compat(text) for text in completion_texts(completions)]


def soft_format_compat(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """d1's soft format: neither part may contain a line break."""
    return [0.5 if _soft_compat(text) else 0.0 for text in completion_texts(completions)]


def strict_format_compat(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """d1's strict format: one line of reasoning, one of answer, and one or two line breaks at the end."""
    return _matching(_STRICT + r"\n$", completion_texts(completions))


def integer_compat(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """d1's integer term: the answer is made of what Unicode calls digits."""
    return [0.5 if answer_or_text(text).isdigit() else 0.0 for text in completion_texts(completions)]


def correctness_compat(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """d1's correctness: the answer is the same string as the column `answer`. No tags are needed."""
    return score_rows(
        "gsm8k:correctness_compat",
        lambda text, gold: 2.0 * (answer_or_text(text) == gold),
        completions,
        {"answer": answer},
    )


def negative_length(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Minus the number of characters: d1's check that a trainer can learn anything at all."""
    return [-float(len(text)) for text in completion_texts(completions)]


def _soft(text: str) -> bool:
    # The first place where the parts meet leaves most text for what must follow, so that no other need be tried.
    meeting = re.compile(r"</reasoning>\s*<answer>").search(text, len("<reasoning>"))
    return text.startswith("<reasoning>") and meeting is not None and text.find("</answer>", meeting.end()) >= 0


def _soft_compat(text: str) -> bool:
    """Whether `<reasoning>.*?</reasoning>\\s*<answer>.*?</answer>` matches at the start, in linear time."""
    line, broken, behind = text.partition("\n")
    if not line.startswith("<reasoning>"):
        return False
    meeting = re.compile(r"</reasoning>[^\S\n]*<answer>").search(line, len("<reasoning>"))
    if meeting is not None and line.find("</answer>", meeting.end()) >= 0:
        return True
    # A line break between the parts comes behind the last thing on the line.
    if not broken or not line[len("<reasoning>") :].rstrip().endswith("</reasoning>"):
        return False
    answer = behind.lstrip().partition("\n")[0]
    return answer.startswith("<answer>") and answer.find("</answer>", len("<answer>")) >= 0


def _strict(text: str) -> bool:
    opened, meeting, closed = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"
    met = text.find(meeting, len(opened))
    ends = text.endswith(closed) and len(text) - len(closed) >= met + len(meeting)
    return text.startswith(opened) and met >= 0 and ends


def _tag_count(text: str) -> float:
    lines = [line.strip() for line in text.splitlines()]
    after = text.rstrip().rpartition("</answer>")
    return 0.125 * sum(lines.count(tag) == 1 for tag in _TAGS) - 0.001 * (len(after[2].strip()) if after[1] else 0)


def _tag_count_compat(text: str) -> float:
    # The order of these operations is d1's, so that the sums agree to the last bit.
    score = 0.0
    if text.count("<reasoning>\n") == 1:
        score += 0.125
    if text.count("\n</reasoning>\n") == 1:
        score += 0.125
    if text.count("\n<answer>\n") == 1:
        score += 0.125
        score -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        score += 0.125
        score -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return score


def _matching(pattern: str, texts: list[str], flags: int = 0) -> list[float | None]:
    return [0.5 if re.match(pattern, text, flags) else 0.0 for text in texts]


def _correctness(text: str, gold: Any) -> float | None:
    number = gold_number(gold)
    return None if number is None else 2.0 * (read_number(text) == number)
