"""Inpainting guidance: pieces of a worked solution in completions of groups that got everything wrong.

IGPO (arXiv 2509.10396, sections 3.1 and 3.2) has the idea, for which a denoiser is made: slots anywhere in the canvas
can be given. Where all G completions of a prompt are wrong, advantages are zero and nothing is learnt. Then G attempts
are decoded, each with a hint ratio eta ~ U(0.2, 0.6): the solution's tokens are cut into chunks of 5 to 10, a share eta
of the chunks is written into the canvas, and the policy writes the rest. Attempts that are right take the place of up
to half of the group.

Chunks keep their order and their distances, stretched by up to 1.5 where the solution is shorter than the canvas; the
last 30 slots are always free, for the answer.

Decided differently from the released code:
- The answer is never given away, as the paper has it (the code's default reveals the last chunk, which states it):
  every writing of the answer in the solution is tokenised on its own and left open. Found are the reference answer,
  what the solution boxes, states behind `####` or between `<answer>` tags, and numbers equal to any of them; an answer
  in other words is not. A row whose answer is not known gets no hints.
- With eta < 1 at least one chunk stays hidden. (The number of hidden ones is rounded down, so that few chunks could all
  be given.)
- A completion whose correctness could not be told is not wrong: its group is left alone.
- Randomness is keyed by rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.algorithms.intervention import Context, Group, Intervention
from rl4dlm.grading.text import hash_answer, last_boxed, parse_number
from rl4dlm.rollout.noise import keyed_uniform

_NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?%?")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SAID = re.compile(r"answer is:?\s*(.+?)\s*\.?\s*$", re.IGNORECASE)


@dataclass
class InpaintingSettings:
    """Settings of `Inpainting`; the defaults are those of IGPO.

    Args:
        trace_column: the dataset's column with worked solutions, text.
        answer_column: its column with the answer, text; rows without one use what the solution states.
        trace_prefix: put before each solution, such as an opening tag of the format that completions have.
        hide_answer: never give tokens of the answer. False is for tasks where the whole completion is the answer.
        correctness_reward: name of the reward function that says whether a completion is right; None: the first one.
        correct_from: the reward from which on it is right.
        hint_ratio: eta is uniform between these two.
        chunk_length: a chunk has between these two numbers of tokens.
        max_replaced_share: at most this share of a group is replaced.
        free_tail: slots at the end of the canvas that are never given.
        max_stretch: the solution is stretched to the canvas by at most this factor.
        max_gap: most free slots between two chunks.
    """

    trace_column: str = field(default="solution", metadata={"help": "Column with the worked solutions hints are from."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answers, which hints leave out."})
    trace_prefix: str = field(default="", metadata={"help": "Text put before each worked solution."})
    hide_answer: bool = field(default=True, metadata={"help": "Never give tokens of the answer as hints."})
    correctness_reward: str | None = field(
        default=None, metadata={"help": "Reward function that says what is right. Default: the first one."}
    )
    correct_from: float = field(default=1.0, metadata={"help": "Its reward from which on a completion is right."})
    hint_ratio: list[float] = field(
        default_factory=lambda: [0.2, 0.6], metadata={"help": "Least and largest share of chunks given as hints."}
    )
    chunk_length: list[int] = field(
        default_factory=lambda: [5, 10], metadata={"help": "Least and largest number of tokens in a chunk."}
    )
    max_replaced_share: float = field(default=0.5, metadata={"help": "Largest share of a group that is replaced."})
    free_tail: int = field(default=30, metadata={"help": "Slots at the end of the canvas that are never given."})
    max_stretch: float = field(default=1.5, metadata={"help": "Largest factor that distances of chunks grow by."})
    max_gap: int = field(default=100, metadata={"help": "Most free slots between two chunks."})

    def check_inpainting(self) -> None:
        """Raises ValueError naming the setting, the value and what is allowed."""
        low, high = _pair("hint_ratio", self.hint_ratio)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"hint_ratio={self.hint_ratio} is not allowed; needed: 0 <= least <= largest <= 1")
        low, high = _pair("chunk_length", self.chunk_length)
        if not 1 <= low <= high or int(low) != low or int(high) != high:
            raise ValueError(
                f"chunk_length={self.chunk_length} is not allowed; needed: integers, 1 <= least <= largest"
            )
        if not 0 <= self.max_replaced_share <= 1:
            raise ValueError(f"max_replaced_share={self.max_replaced_share} is not allowed; it must be in [0, 1]")
        for name in ("free_tail", "max_gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be 0 or larger")
        if not 1 <= self.max_stretch < math.inf:
            raise ValueError(f"max_stretch={self.max_stretch} is not allowed; it must be 1 or larger, and finite")
        if not math.isfinite(self.correct_from):
            raise ValueError(f"correct_from={self.correct_from} is not allowed; it must be finite")


@dataclass
class Inpainting(InpaintingSettings, Intervention):
    """IGPO's intervention, for any trainer: `SomeTrainer(..., intervention=Inpainting())`.

    The settings are those of `InpaintingSettings`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        self.check_inpainting()

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """That with the solutions."""
        return (self.trace_column,)

    def bind(self, context: Context) -> None:
        self._context = context
        names = context.reward_names
        wanted = self.correctness_reward
        if wanted is not None and wanted not in names:
            raise ValueError(f"correctness_reward={wanted!r} is no reward function; choose one of {', '.join(names)}")
        self._column = 0 if wanted is None else names.index(wanted)
        if self.free_tail >= context.canvas_length:
            raise ValueError(
                f"free_tail={self.free_tail} leaves no slot for hints; it must be smaller than "
                f"max_completion_length={context.canvas_length}"
            )

    def attempts(self, group: Group) -> list[Mapping[int, int]]:
        """G attempts where every completion is wrong, and the row has a solution and an answer to hide."""
        rewards = group.rewards[:, self._column]
        if not bool((rewards < self.correct_from).all()) or not self._places(len(group.row_ids)):
            return []
        tokens = self._tokens(group.row)
        if not any(token is not None for token in tokens):
            return []
        low, high = self.hint_ratio
        ids = torch.tensor(group.row_ids)
        ratios = low + (high - low) * keyed_uniform(self._context.seed, "inpainting ratio", ids)
        pairs = zip(group.row_ids, sorted(ratios.tolist()), strict=True)
        return [self._hints(tokens, ratio, row_id) for row_id, ratio in pairs]

    def replacements(self, group: Group, rewards: Tensor) -> dict[int, int]:
        """Random right attempts, for the first members: all of them are wrong."""
        right = (rewards[:, self._column] >= self.correct_from).nonzero().squeeze(-1).tolist()
        ids = torch.tensor(group.row_ids)
        order = keyed_uniform(self._context.seed, "inpainting choice", ids).tolist()
        chosen = sorted(sorted(right, key=lambda attempt: order[attempt])[: self._places(len(group.row_ids))])
        return dict(enumerate(chosen))

    def _places(self, generations: int) -> int:
        return math.floor(self.max_replaced_share * generations + 1e-9)

    def _tokens(self, row: Mapping[str, Any]) -> list[int | None]:
        """The solution's tokens, None where one must not be given; empty where there is nothing to give."""
        context, trace = self._context, row.get(self.trace_column)
        if not isinstance(trace, str) or not trace:
            return []
        pieces = [(self.trace_prefix + trace, False)]
        if self.hide_answer:
            answers = stated_answers(trace, row.get(self.answer_column))
            if not answers:
                return []
            pieces = list(split_at_answers(trace, answers))
            pieces.insert(0, (self.trace_prefix, False))
        never = {context.spec.mask_token_id, *context.spec.eos_token_ids}
        tokens: list[int | None] = []
        for text, is_answer in pieces:
            ids = context.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            tokens += [None if is_answer or token in never else token for token in ids]
        return tokens

    def _hints(self, tokens: Sequence[int | None], ratio: float, row_id: int) -> dict[int, int]:
        """Where a share of the solution's chunks goes."""
        window = self._context.canvas_length - self.free_tail
        seed, key = self._context.seed, torch.tensor(row_id)
        stretch = min(max(window / max(len(tokens), 1), 1.0), self.max_stretch)
        tokens = tokens[:window]
        least, most = self.chunk_length
        uniform = keyed_uniform(seed, "inpainting chunk", key, torch.arange(len(tokens) // least + 1)).tolist()
        lengths = [least + int(u * (most - least + 1)) for u in uniform]
        chunks = chunks_of(len(tokens), lengths, least)
        order = keyed_uniform(seed, "inpainting reveal", key, torch.arange(len(chunks))).argsort().tolist()
        shown = sorted(chunks[i] for i in order[: shown_chunks(len(chunks), ratio)])
        places = placed(shown, stretch, self.max_gap, window)
        given = {}
        for (start, stop), place in zip(shown, places, strict=False):
            for offset, token in enumerate(tokens[start:stop], place):
                if token is not None and offset < window:
                    given[offset] = token
        return given


def chunks_of(length: int, sizes: Sequence[int], least: int) -> list[tuple[int, int]]:
    """Consecutive chunks `(start, stop)` of these sizes; a rest of fewer than `least` tokens is in none."""
    chunks: list[tuple[int, int]] = []
    start = 0
    for size in sizes:
        if length - start < least:
            break
        chunks.append((start, min(start + size, length)))
        start = chunks[-1][1]
    return chunks


def shown_chunks(count: int, ratio: float) -> int:
    """How many chunks are given: all but `floor((1 - ratio) * count)`, and not all unless the ratio is 1."""
    shown = count - math.floor((1 - ratio) * count + 1e-9)
    return shown if ratio >= 1 else min(shown, max(count - 1, 0))


def placed(chunks: Sequence[tuple[int, int]], stretch: float, max_gap: int, window: int) -> list[int]:
    """Where chunks `(start, stop)`, in order, begin in the canvas; those behind the window are left out.

    The distance from the end of the chunk before, or from the start, is stretched and rounded down.
    """
    places: list[int] = []
    end = last = 0
    for start, stop in chunks:
        gap = math.floor((start - last) * stretch)
        place = end + (gap if not places else min(gap, max_gap))
        if place >= window:
            break
        places.append(place)
        end, last = place + stop - start, stop
    return places


def stated_answers(trace: str, answer: Any) -> list[str]:
    """All that a row says is its answer: the reference, and what the solution boxes, tags or states at its end."""
    found = [str(answer) if answer is not None else None, hash_answer(trace), last_boxed(trace)]
    if answer is not None:
        found += [hash_answer(str(answer)), last_boxed(str(answer))]
    found += _TAGGED.findall(trace)
    said = _SAID.search(trace.strip())
    found.append(said[1] if said and "\n" not in said[1] else None)
    stripped = [text.strip().strip("$").strip() for text in found if text is not None]
    return sorted({text for text in stripped if text}, key=len, reverse=True)


def split_at_answers(trace: str, answers: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The pieces of a solution, and whether each is an answer: one of the texts, or a number equal to one of them."""
    hidden = [False] * len(trace)

    def hide(start: int, stop: int) -> None:
        hidden[start:stop] = [True] * (stop - start)

    for answer in answers:
        # Not inside a word or a number: 5 is not the answer in 15 or 5.2.
        before = r"(?<!\w)(?<!\d[.,])" if answer[0].isalnum() else ""
        after = r"(?!\w)(?![.,]\d)" if answer[-1].isalnum() else ""
        flexible = r"\s+".join(map(re.escape, answer.split()))
        for match in re.finditer(before + flexible + after, trace, re.IGNORECASE):
            hide(*match.span())
    numbers = {parse_number(answer) for answer in answers} - {None}
    for match in _NUMBER.finditer(trace):
        # A minus may be a sign or stand between two numbers.
        if {parse_number(match[0]), parse_number(match[0].lstrip("-"))} & numbers:
            hide(*match.span())
    start = 0
    for i in range(1, len(trace) + 1):
        if i == len(trace) or hidden[i] != hidden[start]:
            yield trace[start:i], hidden[start]
            start = i


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name}={value!r} is not allowed; give two numbers, the least and the largest")
    return value[0], value[1]
