"""The tasks of reasoning-gym (arXiv 2505.24760) as tasks of this library.

Owns the rows that its generators make, their splits, and the prompts. Its scorers see a completion in the sandbox alone
(`rl4dlm.grading.reasoning_gym`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from rl4dlm import plugins
from rl4dlm._optional import require
from rl4dlm.grading import reasoning_gym as grading
from rl4dlm.grading.sandbox.data import NotData
from rl4dlm.tasks.base import Row, Task, check_size, check_style, gather, share, split_of

PREFIX = "reasoning_gym"
_OURS = ("seed", "size")  # which its settings have, too
_DEFAULT_SIZE = {"train": 1000, "validation": 100, "test": 100}
_CHUNK = 100  # instances of a generator with one seed
_SPREAD = 100_003
PLAIN = "plain"
_NO_TASK = ("composite",)  # a mixture of the others


class ReasoningGym(Task):
    """Rows `prompt`, `question`, `answer` (one that is right; "" where the task states none) and `entry` (what the
    scorer needs). Made by `reasoning_gym_task`.

    Which split an instance belongs to is a property of its question, so that no seed, size or difficulty moves it to
    another: of ten parts one is for testing, one for validation. Rows of a split may repeat where a task has few.

    Args:
        size: rows of a split; by default 1,000 for training, 100 for validation and test.
        seed: which instances are drawn.
        style: "default", "DeepSeekZero", "simple", "direct" or "chain_of_draft": reasoning-gym's system prompts, which
            ask for `<answer>` tags; "plain" is the question alone, and the whole completion is the answer.
        settings: of the task, as reasoning-gym names them, for example `max_terms=3`.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: a setting that the task does not have, or a value that it refuses.
    """

    task: ClassVar[str]
    name: ClassVar[str]

    def __init__(self, size: int | None = None, seed: int = 0, style: str = "default", **settings: Any) -> None:
        check_size(size)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}; it must be a whole number from 0")
        self.gym = _library()
        self.prompts: dict[str, str] = self.gym.utils.SYSTEM_PROMPTS
        check_style(style, (*self.prompts, PLAIN))
        self.size, self.seed, self.style = size, seed, style
        self.settings = self._checked(settings)

    @property
    def protocol(self) -> str:
        """The style of the prompt."""
        return f"style={self.style}"

    def require(self) -> None:
        """Raises if answers cannot be scored, see `rl4dlm.grading.reasoning_gym.require_scorers`."""
        grading.require_scorers()

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the answer has the full score; None where it could not be scored."""
        return self.check_many([completion], [row])[0]

    def check_many(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """`check` for each pair, several at a time."""
        return self.measured(completions, rows)[0]

    def metrics(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """`solved`, the share with the full score, and `score`, the mean of what reasoning-gym gives."""
        return self.measured(completions, rows)[1]

    def measured(
        self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[bool | None], dict[str, float]]:
        """Verdicts and metrics of one pass."""
        known = [row for row, one in enumerate(rows) if one.get("entry")]
        found = grading.scores([completions[row] for row in known], [rows[row]["entry"] for row in known])
        verdicts: list[bool | None] = [None] * len(rows)
        for row, score in zip(known, found, strict=True):
            verdicts[row] = None if score.value is None else score.value >= grading.EXACT
        values = [score.value for score in found if score.value is not None]
        solved = [verdict for verdict in verdicts if verdict is not None]
        return verdicts, {"solved": share(sum(solved), len(solved)), "score": share(sum(values), len(values))}

    def _rows(self, split: str) -> list[Row]:
        made = self._instances()

        def draw() -> Row | None:
            entry = next(made)
            return self._row(entry) if split_of(entry["question"]) == split else None

        return gather(draw, self.size or _DEFAULT_SIZE[split], f"{split} instances of {self.name}")

    def _instances(self) -> Any:
        """Entries without end: reasoning-gym makes the one of an index from its seed plus the index."""
        first = self.seed * _SPREAD
        for chunk in range(_SPREAD):
            dataset = self._made((first + chunk) * _CHUNK % 2**31, _CHUNK, self.settings)
            for index in range(_CHUNK):
                yield dataset[index]

    def _row(self, entry: Mapping[str, Any]) -> Row:
        question = str(entry["question"])
        tags = self.style != PLAIN
        messages = [("system", self.prompts.get(self.style, "")), ("user", question)]
        try:
            text = grading.entry_text(self.task, self.settings, entry, tags=tags)
        except NotData as error:
            raise ValueError(f"{self.name} has an entry that cannot be sent to the sandbox: {error}") from error
        return {
            "prompt": [{"role": role, "content": content} for role, content in messages] if tags else f"{question}\n",
            "question": question,
            "answer": str(entry["answer"] if entry["answer"] is not None else ""),
            "entry": text,
        }

    def _checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as the task takes them: tuples may come as lists, from JSON."""
        known = {field.name: field for field in fields(self.gym.factory.DATASETS[self.task][1])}
        for name in settings:
            if name not in known or name in _OURS:
                options = [*_OURS, "style", *(other for other in known if other not in _OURS)]
                raise ValueError(
                    f"task {self.name!r} has no option {name!r}; its options: {', '.join(options)}"
                    f"{plugins.did_you_mean(name, options)}"
                )
        taken = {name: _like(known[name], value) for name, value in settings.items()}
        self._made(0, 1, taken)
        return taken

    def _made(self, seed: int, size: int, settings: Mapping[str, Any]) -> Any:
        try:
            return self.gym.create_dataset(self.task, **settings, seed=seed, size=size)
        except Exception as error:  # asserts and whatever a wrong type leads to
            given = ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "its own settings"
            raise ValueError(f"task {self.name!r} does not take {given}: {error}") from error


def reasoning_gym_task(task: str) -> type[ReasoningGym]:
    """The class of a task of reasoning-gym, by its name there, for example "chain_sum".

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: it has no such task.
    """
    known = sorted(set(_library().factory.DATASETS) - set(_NO_TASK))
    if task not in known:
        raise ValueError(
            f"reasoning-gym has no task {task!r}{plugins.did_you_mean(task, known)}; its tasks: {', '.join(known)}"
        )
    return type(ReasoningGym.__name__, (ReasoningGym,), {"task": task, "name": f"{PREFIX}:{task}"})


def _library() -> Any:
    return require("reasoning_gym", extra=grading.EXTRA, purpose="a task of reasoning-gym")


def _like(field: Any, value: Any) -> Any:
    default = field.default if field.default is not MISSING else None
    return tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
