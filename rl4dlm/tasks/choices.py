"""Multiple choice: ARC (arXiv 1803.05457) and GPQA (arXiv 2311.12022).

Owns the readers, from the hub or a file, the order of the choices, the prompt, and the checker. The prompt is ours:
the papers of the field score choices by likelihood, or write prompts of their own.
"""

from __future__ import annotations

import re
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from rl4dlm.grading.text import last_answer_block, last_boxed
from rl4dlm.tasks.base import Row, Task, check_size
from rl4dlm.tasks.files import Paths, files_by_split, read_hub, read_rows

LETTERS = "ABCDEFGH"
_ASK = "\n\nThink step by step, and put the letter of the right answer in \\boxed{}."
_STATED = re.compile(r"\b[Aa]nswer(?:\s+is)?\s*:?\s*\(?([A-H])\b")
_LETTER = re.compile(r"(?:\\(?:text|mathrm|textbf)\{)?\s*\(?([A-H])(?:\)|\.|:|\}|\s|$)")


class Choices(Task):
    """Rows `prompt` (chat messages), `question`, `choices` (texts) and `answer` (a letter, A to H)."""

    size: int | None
    path: Paths

    @abstractmethod
    def _source(self, split: str) -> list[Row]:
        """The published rows of a split."""

    @abstractmethod
    def _read(self, row: Mapping[str, Any]) -> tuple[str, list[str], int]:
        """The question, its choices in the order they are shown in, and which one is right."""

    def _rows(self, split: str) -> list[Row]:
        rows = []
        for row in self._source(split)[: self.size]:
            question, choices, right = self._read(row)
            if not 2 <= len(choices) <= len(LETTERS):
                raise ValueError(
                    f"task {self.name!r}: a question has {len(choices)} choices; 2 to {len(LETTERS)} are read"
                )
            listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
            content = f"{question}\n\n{listed}{_ASK}"
            rows.append(
                {
                    "prompt": [{"role": "user", "content": content}],
                    "question": question,
                    "choices": choices,
                    "answer": LETTERS[right],
                }
            )
        return rows

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the letter is the right one, or the text of the right choice is given; `None` if the row has none.

        Read is what the last `<answer>` holds, or the last box (also one in it); without either, what is last said to
        be the answer; a completion that is a letter and nothing else will do too.
        """
        answer, choices = row.get("answer"), list(row.get("choices") or ())
        if not isinstance(answer, str) or answer not in LETTERS[: len(choices) or None]:
            return None
        found = read_choice(completion, choices)
        return found == answer


def read_choice(completion: str, choices: Sequence[str]) -> str | None:
    """The letter that a completion chooses; see `Choices.check`."""
    block = last_answer_block(completion)
    stated = last_boxed(completion if block is None else block)
    if stated is None:
        stated = block
    if stated is None:
        said = _STATED.findall(completion)
        stated = said[-1] if said else completion.strip()
    for letter, text in zip(LETTERS, choices, strict=False):
        if stated.strip().casefold() == text.strip().casefold():
            return letter
    found = _LETTER.match(stated.strip())
    return found[1] if found else None


@dataclass(frozen=True)
class ARC(Choices):
    """The AI2 reasoning challenge, grade-school science.

    Args:
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with columns `question`, `choices` (`text` and `label`, lists) and
            `answerKey` for the test split, or a mapping from splits to files. Splits without a file come from the hub.
        hub_id: dataset on the hub with the same columns. hub_config: "ARC-Challenge" or "ARC-Easy".
    """

    name: ClassVar[str] = "arc"

    size: int | None = None
    path: Paths = None
    hub_id: str = "allenai/ai2_arc"
    hub_config: str = "ARC-Challenge"

    def __post_init__(self) -> None:
        check_size(self.size)
        files_by_split(self.path, self.splits)

    def _source(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)
        if split in files:
            return read_rows(files[split], "question", "choices", "answerKey")
        return read_hub(self.hub_id, self.hub_config, split)

    def _read(self, row: Mapping[str, Any]) -> tuple[str, list[str], int]:
        choices = row["choices"]
        if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
            raise ValueError(f"choices={choices!r}; a mapping with the lists `text` and `label` is needed")
        labels = list(choices["label"])  # letters, or digits from 1
        if row["answerKey"] not in labels:
            raise ValueError(f"answerKey={row['answerKey']!r} is none of the labels {labels}")
        return row["question"], list(choices["text"]), labels.index(row["answerKey"])


@dataclass(frozen=True)
class GPQA(Choices):
    """Graduate-level questions of biology, physics and chemistry. The hub asks for consent before it gives them.

    They have one split, which is the test split here. A question's choices are shuffled by its text and `seed`, so that
    their order depends on nothing else.

    Args:
        size: at most this many rows, from the beginning.
        path: a CSV, JSON, JSONL or parquet file with columns `Question`, `Correct Answer` and `Incorrect Answer 1` to
            `3` for the test split, or a mapping from splits to files. Without one rows come from the hub.
        hub_id: dataset on the hub with the same columns. hub_config: "gpqa_diamond", "gpqa_main" or "gpqa_extended".
        seed: of the order of choices.
    """

    name: ClassVar[str] = "gpqa"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    size: int | None = None
    path: Paths = None
    hub_id: str = "Idavidrein/gpqa"
    hub_config: str = "gpqa_diamond"
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size)
        files_by_split(self.path, self.splits)

    def _source(self, split: str) -> list[Row]:
        files = files_by_split(self.path, self.splits)
        if split in files:
            return read_rows(files[split], "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
        return read_hub(self.hub_id, self.hub_config, "train")

    def _read(self, row: Mapping[str, Any]) -> tuple[str, list[str], int]:
        question = str(row["Question"]).strip()
        names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
        texts = [str(row[name]).strip() for name in names]
        order = list(range(len(texts)))
        Random(zlib.crc32(question.encode()) ^ self.seed).shuffle(order)
        return question, [texts[i] for i in order], order.index(0)
