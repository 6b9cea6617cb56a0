"""AceCode-87K, synthetic problems with assertions (AceCoder, arXiv 2502.01718), and DiffuCoder's hard part of it.

Owns the reader, from the hub or a file in the published columns, and the rule of the hard part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, ClassVar

from rl4dlm.grading.code.problem import Problem
from rl4dlm.tasks.base import Row
from rl4dlm.tasks.code import prompts
from rl4dlm.tasks.code.mbpp import listed_texts
from rl4dlm.tasks.code.sources import asserts, entry_point_of, signature_of
from rl4dlm.tasks.code.training_sets import TrainingSet

_MODELS = ("qwen_coder_2.5", "llama3_instruct")
_SUBSETS = ("hard", "all")


@dataclass(frozen=True)
class AceCode(TrainingSet):
    """Rows `prompt`, `problem`, `question`, `solution` (the best program that comes with the data) and `task_id`.

    A file has the columns `question` and `test_cases` (a list of assertions), and for the hard part `inferences` (a
    list of programs with `model_name`, `completion` and `pass_rate`). Options are those of `TrainingSet`, and

    Args:
        subset: "hard": the part that DiffuCoder (arXiv 2506.20639) trains on, see `hard`, with each question that does
            not say "you" a second time as a function to complete. "all": every row, once, as in a file that was chosen
            from before.
    """

    name: ClassVar[str] = "acecode"
    columns: ClassVar[tuple[str, ...]] = ("question", "test_cases")

    style: str = "diffucoder"
    hub_id: str = "TIGER-Lab/AceCode-87K"
    subset: str = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset not in _SUBSETS:
            raise ValueError(f"subset={self.subset!r}; choose one of {', '.join(_SUBSETS)}")

    def _chosen(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return hard(rows) if self.subset == "hard" else rows

    def _made(self, row: dict[str, Any]) -> list[Row]:
        listed = listed_texts(row["test_cases"])
        entry_point = entry_point_of(listed)
        best = max(row.get("inferences") or [], key=lambda found: found["pass_rate"], default=None)
        program = best["completion"] if best else ""
        question = row["question"]
        made = [(question, "")]
        head = program.split(":\n")[0].strip()
        if self.subset == "hard" and "you" not in question.lower() and head.startswith("def "):
            made.append((prompts.docstring_variant(question, head), f'{head}:\n    """\n    {question}\n    """\n'))
        signature = signature_of(program, entry_point)
        return [
            {
                "prompt": prompts.training(text, style=self.style, test=listed[0], signature=signature),
                "problem": Problem(tuple(asserts(listed)), entry_point=entry_point, prefix=prefix).to_json(),
                "question": question,
                "solution": program,
                "task_id": str(row.get("id") or ""),
            }
            for text, prefix in made
        ]


def hard(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """DiffuCoder's hard part: of the pass rates of two models' programs, rows with a mean in the lowest fifth and, of
    all rows, a deviation that is not in the lowest two fifths.

    The paper writes "top 40 %" of the variance, the released code keeps the top 60 %; here it is the code. Rows without
    a program of these models, of which it makes no numbers, are left out.

    Raises:
        ValueError: no row has such programs.
    """
    rates = [
        [float(found["pass_rate"]) for found in row.get("inferences") or [] if found["model_name"] in _MODELS]
        for row in rows
    ]
    known = [found for found in rates if found]
    if not known:
        raise ValueError(
            f"subset='hard' needs the column inferences with programs of {' and '.join(_MODELS)}; a file that was "
            "chosen from before is read with subset='all'"
        )
    most = percentile([fmean(found) for found in known], 20)
    least = percentile([pstdev(found) for found in known], 40)
    return [
        row for row, found in zip(rows, rates, strict=True) if found and fmean(found) <= most and pstdev(found) >= least
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """Of at least one value, with linear interpolation between neighbours, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
