"""Rewards for code: the share of tests that a completion's program passes, and how the program is presented.

Programs run in a sandbox (`rl4dlm.grading.sandbox`), and their values are compared in the trainer's process. Functions
ending in `_compat` pay as released code did, with which its numbers were made; but for them, too, programs are run and
judged as above, so a program that only ends its process early earns nothing, while there it did.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from rl4dlm.grading.code.extract import code_blocks
from rl4dlm.grading.code.parse import parse
from rl4dlm.grading.code.verdicts import Verdict, judge, read_problem
from rl4dlm.grading.sandbox.backends import require_backend
from rl4dlm.grading.text import answer_blocks, completion_texts, require_column

_FENCE = "```"
_FIRST_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# The words that d1's code refuses, with the spaces that it asks for.
_REFUSED = (" os", " sys", " subprocess", " shutil", " socket", " psutil", " ctypes", " pathlib", " builtins")


def _runs_programs(reward: Callable[..., list[float | None]]) -> Callable[..., list[float | None]]:
    """Has trainers make sure, before anything is trained, that there is a sandbox (`rl4dlm.training.checks`)."""
    reward.requires = require_backend  # type: ignore[attr-defined]
    return reward


@_runs_programs
def code(
    prompts: Sequence[Any], completions: Sequence[Any], problem: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """The share of the problem's tests that the program passes, in [0, 1]. Needs the column `problem`.

    The program is the last complete fenced block, or what goes on from the prompt's signature
    (`rl4dlm.grading.code.extract`); without one, or with one that does not parse, the reward is 0 and nothing is run.
    `None` where the row has no problem, or the machine that ran a test failed. Logs metrics, see `docs/rewards.md`.
    """
    return [_share(verdict) for verdict in _verdicts("code", completions, problem, columns)]


@_runs_programs
def all_passed(
    prompts: Sequence[Any], completions: Sequence[Any], problem: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """1 where all tests are passed, 0 where one is not, as Dream-Coder (arXiv 2509.01142) pays; else as `code`."""
    shares = [_share(verdict) for verdict in _verdicts("code:all_passed", completions, problem, columns)]
    return [None if share is None else float(share == 1.0) for share in shares]


def format(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 for exactly one fenced block of Python that parses, with nothing behind it; 0.5 if it does not parse; else 0.

    As DiffuCoder (arXiv 2506.20639) describes it, which weighs it with 0.5.
    """
    return [_format(text, exact=False) for text in completion_texts(completions)]


def answer_tags(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """0.5 where the last block of Python stands inside `<answer>...</answer>`, as d1 asks for on KodCode; else 0."""
    return [_answer_tags(text) for text in completion_texts(completions)]


@_runs_programs
def code_compat(
    prompts: Sequence[Any], completions: Sequence[Any], problem: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """DiffuCoder's `code_reward`: as `code`, but 0 unless `format_compat` is 1, and 0 if any test runs out of time.

    There the time-out of one test ends the script that runs them all. A test has 5 seconds, which is the default here.
    """
    texts = completion_texts(completions)
    programs = [_first_block(text) if _format(text, exact=True) == 1.0 else None for text in texts]
    verdicts = _verdicts("code:code_compat", completions, problem, columns, programs)
    late = [verdict is not None and any(test.status == "timeout" for test in verdict.tests) for verdict in verdicts]
    return [0.0 if slow else _share(verdict) for slow, verdict in zip(late, verdicts, strict=True)]


def format_compat(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """DiffuCoder's `code_format_reward`: as `format`, but only "python" opens a block, and one line break follows it.

    So a completion that ends with its block scores 0.
    """
    return [_format(text, exact=True) for text in completion_texts(completions)]


@_runs_programs
def kodcode_compat(
    prompts: Sequence[Any], completions: Sequence[Any], problem: Sequence[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """d1's `coding_reward_func` for KodCode: the share of tests, plus 0.5 where the block stands in `<answer>` tags.

    The first block of Python counts, and its first function gets the name that is asked for. A program with a word of a
    list, such as " os" or "__import__", passes no test, also where the word is another's beginning. A test had one
    second there (`RL4DLM_REWARD_DEADLINE=1`).
    """
    texts = completion_texts(completions)
    column = require_column("code:kodcode_compat", "problem", problem, len(texts))
    wanted = [getattr(read_problem(value), "entry_point", None) for value in column]
    programs = [_kodcode_program(text, name) for text, name in zip(texts, wanted, strict=True)]
    verdicts = _verdicts("code:kodcode_compat", completions, problem, columns, programs)
    rewards: list[float | None] = []
    for text, name, verdict in zip(texts, wanted, verdicts, strict=True):
        share = None if name is None else _share(verdict)  # without a name d1's code has nothing to call
        rewards.append(None if share is None else share + _in_answer_compat(text))
    return rewards


def _share(verdict: Verdict | None) -> float | None:
    return None if verdict is None else verdict.passed


def _verdicts(
    reward: str,
    completions: Sequence[Any],
    problems: Sequence[str | None] | None,
    columns: dict[str, Any],
    programs: Sequence[str | None] | None = None,
) -> list[Verdict | None]:
    texts = completion_texts(completions)
    column = require_column(reward, "problem", problems, len(texts))
    given = [value for value in column if value is not None]
    if given and all(read_problem(value) is None for value in given):
        raise ValueError(
            f"reward {reward!r}: no value of the column 'problem' is a problem, such as {str(given[0])[:80]!r}; it is "
            "the text that rl4dlm.grading.code.problem.Problem.to_json() gives"
        )
    started = time.monotonic()
    verdicts = judge(texts, list(column), programs=programs)
    if "log_metric" in columns:
        _log(columns["log_metric"], [verdict for verdict in verdicts if verdict], time.monotonic() - started)
    return verdicts


def _log(log_metric: Callable[[str, float], Any], verdicts: Sequence[Verdict], seconds: float) -> None:
    log_metric("reward/seconds", seconds)
    rows = max(len(verdicts), 1)
    ran = [
        [test for test in verdict.tests if test.status not in ("malformed", "no_code", "syntax")]
        for verdict in verdicts
    ]
    for name, statuses in (("deadline", ("timeout",)), ("lost", ("lost", "budget"))):
        late = sum(any(test.status in statuses for test in tests) for tests in ran)
        log_metric(f"reward/{name}_rate", late / rows)
    log_metric("reward/no_program_rate", sum(verdict.program is None for verdict in verdicts) / rows)
    places = [test.where for tests in ran for test in tests]
    for where in ("apart", "inside"):
        log_metric(f"reward/tests_{where}_share", places.count(where) / max(len(places), 1))


def _format(text: str, *, exact: bool) -> float:
    pieces = text.split(_FENCE)
    if len(pieces) != 3:
        return 0.0
    label, line_break, block = pieces[1].partition("\n")
    if not line_break or (pieces[2] != "\n" if exact else pieces[2].strip()):
        return 0.0
    if label != "python" if exact else label.strip().lower() not in ("python", "python3", "py"):
        return 0.0
    return 1.0 if parse(block.strip() if exact else block) is not None else 0.5


def _first_block(text: str) -> str | None:
    found = _FIRST_BLOCK.search(text)
    return found[1] if found else None


def _answer_tags(text: str) -> float:
    def has_code(part: str) -> bool:
        return any(label.lower() in ("python", "python3", "py") for label, _ in code_blocks(part))

    blocks = list(answer_blocks(text))
    return 0.5 if blocks and has_code(blocks[-1]) else 0.0


def _in_answer_compat(text: str) -> float:
    program = _first_block(text)
    answer = next(answer_blocks(text), "")
    return 0.5 if program and f"```python\n{program}```" in answer else 0.0


def _kodcode_program(text: str, wanted: str | None) -> str | None:
    program = _first_block(text) or ""
    defined = re.search(r"def (\w+)\(", program)
    if defined is None or wanted is None:
        return None
    if defined[1] != wanted:
        program = re.sub(rf"\bdef {defined[1]}\b", f"def {wanted}", program)
    refused = any(word in program for word in (*_REFUSED, "__import__"))
    return None if refused or parse(program) is None else program
