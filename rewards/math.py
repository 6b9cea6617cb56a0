r"""Rewards for MATH: correctness, and tiers of format, as d1 (arXiv 2504.12216) describes them.

Functions ending in `_compat` are d1's own, with which its numbers were made. They compare strings; and their format
tiers look for a box with a literal in which `\b` is a backspace character, so that a real `\boxed` is never found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.columns import as_text
from rl4dlm.grading.latex import equivalent
from rl4dlm.grading.math_strings import is_equiv, last_boxed_only_string, remove_boxed
from rl4dlm.grading.pool import current_settings, usage
from rl4dlm.grading.text import completion_texts, last_answer_block, last_boxed, require_column, score_rows, total
from rl4dlm.tasks.math import gold_answer, read_answer


def math(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """`correctness` plus `format_tiers`, at most 3. Needs the column `answer`."""
    return total(correctness(prompts, completions, answer, **columns), format_tiers(prompts, completions))


def correctness(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """2 if the answer equals the column `answer` (LaTeX, or a solution that boxes it) as mathematics, `None` without
    one.

    The answer is the last box, else what `<answer>` holds, else everything. It is compared in a sandbox, where
    five seconds are enough for each (`rl4dlm.grading.pool.Settings`); an answer that needs longer scores 0, and
    one that could not be compared, since others used the batch's time, `None`. Logs `reward/deadline_rate`
    and `reward/seconds` where TRL passes `log_metric`.
    """
    golds = [as_text(gold) for gold in require_column("math:correctness", "answer", answer, len(completions))]
    pairs = [
        (gold_answer(gold), read_answer(text))
        for gold, text in zip(golds, completion_texts(completions), strict=True)
        if gold is not None
    ]
    before = usage()
    verdicts = iter(equivalent(pairs, deadline=current_settings().deadline))
    if "log_metric" in columns:
        after = usage()
        columns["log_metric"]("reward/deadline_rate", (after.late - before.late) / max(len(completions), 1))
        columns["log_metric"]("reward/seconds", after.seconds - before.seconds)
    equal = [None if gold is None else next(verdicts) for gold in golds]
    return [None if verdict is None else 2.0 * verdict for verdict in equal]


def format_tiers(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1 for a box inside `<answer>...</answer>`, 0.75 for the tags alone, 0.5 for a box alone, 0.25 for neither."""
    return [_tier(text) for text in completion_texts(completions)]


def math_compat(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """The sum of d1's two terms."""
    return total(correctness_compat(prompts, completions, answer), format_tiers_compat(prompts, completions))


def correctness_compat(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """d1's correctness: equal normal forms of the last boxes. A completion that has none is compared whole, tags
    included.

    `None` where the box of the column `answer` never closes; d1's function fails there.
    """
    return score_rows("math:correctness_compat", _correctness_compat, completions, {"answer": answer})


def format_tiers_compat(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """d1's tiers: 0.75 with an `<answer>`, closed or not, 0.25 without; 0.25 more for a backspace before "oxed"."""
    return [_tier_compat(text) for text in completion_texts(completions)]


def _tier(text: str) -> float:
    block = last_answer_block(text)
    boxed = last_boxed(text if block is None else block) is not None
    return 0.25 + 0.5 * (block is not None) + 0.25 * boxed


def _tier_compat(text: str) -> float:
    before, tag, after = text.partition("<answer>")
    inside = after.partition("<answer>")[0].partition("</answer>")[0] if tag else before
    found = "\boxed" in inside  # not a raw string: \b is a backspace, as in the original
    return 0.5 * (bool(tag) + (1.0 if found else 0.5))


def _correctness_compat(text: str, gold: str) -> float | None:
    try:
        wanted = remove_boxed(last_boxed_only_string(gold))
    except (TypeError, AssertionError):
        return None
    with contextlib.suppress(TypeError, AssertionError):
        text = remove_boxed(last_boxed_only_string(text))
    return 2.0 * is_equiv(text, wanted)
