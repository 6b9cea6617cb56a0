"""Recorded rewards of d1 against the `_compat` rewards, row by row: equal to the last bit.

Runs on the tables of any case of this family, whatever rows they hold; a row's columns say which task it is of.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from rl4dlm.grading import load_reward
from rl4dlm.grading.math_strings import strip_string
from rl4dlm.grading.text import answer_or_text, hash_answer
from tests.conformance import report
from tests.conformance.cases import Case, load_cases

_CASES = [case for case in load_cases() if case.kind == "rewards"]

# The reference's names and ours.
_GSM8K = {
    "correctness_reward_func": "gsm8k:correctness_compat",
    "int_reward_func": "gsm8k:integer_compat",
    "strict_format_reward_func": "gsm8k:strict_format_compat",
    "soft_format_reward_func": "gsm8k:soft_format_compat",
    "xmlcount_reward_func": "gsm8k:tag_count_compat",
    "reward_len": "gsm8k:negative_length",
}
_TEXT = {"extract_xml_answer": answer_or_text, "extract_hash_answer": hash_answer}
_MATH = {"correctness": "math:correctness_compat", "boxed_and_answer_tags": "math:format_tiers_compat"}


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_recorded_rewards(case: Case) -> None:
    # Read again: `Case` turns texts such as "nan" into floats.
    outputs = json.loads(case.path.read_text(encoding="utf-8"))["outputs"]
    assert set(outputs) <= {"table", "strip_string"} and any(outputs.values()), f"unknown outputs: {list(outputs)}"
    for row in outputs.get("table", ()):
        for reference, expected in _recorded(row).items():
            assert _ours(reference, row) == expected, (reference, row)
    for row in outputs.get("strip_string", ()):
        assert _stripped(row["text"]) == (row.get("strip_string"), row.get("raises")), row
    report.equal[case.family].append(case.name)


def _recorded(row: dict[str, Any]) -> dict[str, Any]:
    """The reference's results in a row, by its own names."""
    if "scores" in row:
        return {**row["scores"], **{name: row[name] for name in _TEXT if name in row}}
    recorded = {name: row[name] for name in (*_MATH, "score") if name in row}
    assert recorded, f"nothing is recorded in {row}"
    return recorded


def _ours(reference: str, row: dict[str, Any]) -> Any:
    if reference in _TEXT:
        return _TEXT[reference](row["text"])
    if reference == "score":
        name = "countdown:countdown_compat" if "numbers" in row else "sudoku:sudoku_compat"
    else:
        name = {**_GSM8K, **_MATH}[reference]
    columns = {key: [row[key]] for key in ("answer", "target", "numbers", "puzzle", "solution") if key in row}
    prompts = [[{"role": "user", "content": "?"}]]
    completions = [[{"role": "assistant", "content": row["text"]}]]
    return load_reward(name)(prompts, completions, **columns)[0]


def _stripped(text: str) -> tuple[str | None, str | None]:
    try:
        return strip_string(text), None
    except Exception as error:  # the recorded name says which one it has to be
        return None, type(error).__name__
