r"""Inpainting guidance: pieces of a worked solution in completions of groups that got everything wrong.

IGPO (arXiv 2509.10396, sections 3.1 and 3.2) has the idea, for which a denoiser is made: slots anywhere in the canvas
can be given. Where all G completions of a prompt are wrong, advantages are zero and nothing is learnt. Then G attempts
are decoded, each with a hint ratio eta ~ U(0.2, 0.6): the solution's tokens are cut into chunks of 5 to 10, a share eta
of the chunks is written into the canvas, and the policy writes the rest. Attempts that are right take the place of up
to half of the group.

Chunks keep their order and their distances, stretched by up to 1.5 where the solution is shorter than the canvas; the
last 30 slots are always free, for the answer.

Decided differently from the released code:
- The answer is never given away, as the paper has it (the code's default reveals the last chunk, which states it):
  every writing of the answer in the solution is tokenised on its own and left open. Answers are the reference, what the
  solution boxes, states behind `####`, between `<answer>` tags or in an "answer is" at its end, the right sides of
  their equations, their parts between commas, and all of these without brackets around them. Hidden are their texts,
  whatever the spacing, the case and the form of LaTeX (`\dfrac`, `\text{}`, `\left(`, degrees, dollars); where an
  answer is a number, all numbers that are equal to it, be they written as fractions, decimals, percentages or with
  separators of thousands; and where it is not, all numbers that are in it. An answer in other words ("a half") or as
  another expression of letters is not found. A row whose answer is not known gets no hints.
- With eta < 1 at least one chunk stays hidden. (The number of hidden ones is rounded down, so that few chunks could all
  be given.)
- A completion whose correctness could not be told is not wrong: its group is left alone.
- Randomness is keyed by rows.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from rl4dlm.grading.text import hash_answer, last_boxed
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.training.interventions.intervention import Context, Group, Intervention

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SAID = re.compile(r"answer is:?\s*(.+?)\s*\.?\s*$", re.IGNORECASE)

# Numbers, as solutions write them.
_GROUPS = r"\d{1,3}(?:(?:,\\!|\{,\}|,|\\[,;: ]|[~ \u00a0\u2009\u202f])\d{3})+(?!\d)"
_PLAIN = rf"(?:(?:{_GROUPS}|\d+)(?:\.\d+)?|\.\d+)"
_SIGN = r"(?:[-\u2212]\s*)?(?:\\?\$)?"
_ARGUMENT = rf"\s*(?:\{{\s*([-\u2212]?\s*{_PLAIN})\s*\}}|(\d))"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    rf"(?:(?P<whole>\d+)\s*)?\\[dtc]?frac(?![a-zA-Z]){_ARGUMENT}{_ARGUMENT}"
    rf"|(?:(?P<units>\d+)\s+)?(?P<over>{_PLAIN})\s*(?:/|\u00f7|\\over(?![a-zA-Z]))\s*(?P<under>{_PLAIN})"
    rf"|(?P<plain>{_PLAIN})"
    rf")(?P<percent>\s*\\?%)?"
)
_DIGITS = re.compile(rf"{_PLAIN}")
_DIGIT_GROUP = re.compile(r"\d+(?:\.\d+)?|\.\d+")

# What a text keeps of itself when it is compared: neither spaces nor how LaTeX sets it.
_LOOKS = "quad|qquad|left|right|big|Big|bigg|Bigg|displaystyle|textstyle|degrees?|circ"
_FONTS = "text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|boldsymbol|operatorname|emph"
_PIECE = re.compile(
    rf"(?P<dropped>\s+|[~$%{{}}\u00b0]|\\[,;:! $%()\[\]]|\\(?:{_LOOKS}|{_FONTS})(?![a-zA-Z])|\^\s*\{{?\s*\\circ"
    r"|(?<![a-zA-Z])degrees?(?![a-zA-Z]))|(?P<fraction>\\[dtc]?frac(?![a-zA-Z]))|(?P<one>.)",
    re.DOTALL,
)
_SAME = {"\u2212": "-", "\u03c0": r"\pi", "\u221a": r"\sqrt", "\u221e": r"\infty"}
_PARTS = re.compile(r"[,;]|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
_LONGEST_NUMBER = 64  # digits
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclass
class InpaintingSettings:
    """Settings of `Inpainting`; the defaults are those of IGPO.

    Args:
        trace_column: the dataset's column with worked solutions, text.
        answer_column: its column with the answer, text, which it must have if `hide_answer`; None: there is none. Rows
            without an answer use what the solution states.
        trace_prefix: put before each solution, such as an opening tag of the format that completions have.
        hide_answer: never give tokens of the answer. False is for tasks where the whole completion is the answer.
        correctness_reward: name of the reward function that says whether a completion is right; None: the only one.
        correct_from: the reward from which on it is right.
        hint_ratio: eta is uniform between these two.
        chunk_length: a chunk has between these two numbers of tokens.
        max_replaced_share: at most this share of a group is replaced.
        free_tail: slots at the end of the canvas that are never given.
        max_stretch: the solution is stretched to the canvas by at most this factor.
        max_gap: most free slots between two chunks.
    """

    trace_column: str = field(default="solution", metadata={"help": "Column with the worked solutions hints are from."})
    answer_column: str | None = field(
        default="answer",
        metadata={"help": "Column with the answers, which hints leave out. null: solutions alone state them."},
    )
    trace_prefix: str = field(default="", metadata={"help": "Text put before each worked solution."})
    hide_answer: bool = field(default=True, metadata={"help": "Never give tokens of the answer as hints."})
    correctness_reward: str | None = field(
        default=None, metadata={"help": "Reward function that says what is right. Default: the only one."}
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
        """Those with the solutions and, if they are to be hidden, with the answers."""
        hidden = self.hide_answer and self.answer_column is not None
        return (self.trace_column, self.answer_column) if hidden else (self.trace_column,)  # type: ignore[return-value]

    def bind(self, context: Context) -> None:
        self._context = context
        names = context.reward_names
        wanted = self.correctness_reward
        if wanted is None and len(names) > 1:
            raise ValueError(
                f"correctness_reward=None is not allowed with several rewards; choose one of {', '.join(names)}"
            )
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
            answers = stated_answers(trace, row.get(self.answer_column) if self.answer_column is not None else None)
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
    found = [str(answer) if answer is not None else None, hash_answer(trace), *_boxes(trace)]
    if answer is not None:
        found += [hash_answer(str(answer)), *_boxes(str(answer))]
    found += _TAGGED.findall(trace)
    said = _SAID.search(trace.strip())
    found.append(said[1] if said and "\n" not in said[1] else None)
    stripped = [text.strip().strip("$").strip() for text in found if text is not None]
    return sorted({text for text in stripped if text}, key=len, reverse=True)


def split_at_answers(trace: str, answers: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The pieces of a solution, and whether each writes an answer; what does is in the module's docstring."""
    hidden = [False] * len(trace)
    forms = {form for answer in answers for form in _forms(answer)}
    for start, stop in [*_texts_in(trace, forms), *_numbers_in(trace, forms)]:
        hidden[start:stop] = [True] * (stop - start)
    start = 0
    for i in range(1, len(trace) + 1):
        if i == len(trace) or hidden[i] != hidden[start]:
            yield trace[start:i], hidden[start]
            start = i


def _boxes(text: str) -> list[str | None]:
    starts = [match.start() for match in re.finditer(r"\\boxed", text)]
    return [last_boxed(text[start:stop]) for start, stop in itertools.pairwise([*starts, len(text)])]


def _forms(answer: str) -> set[str]:
    """An answer, the right side of its equation, its parts, and all of these without brackets around them."""
    forms: set[str] = set()
    for text in (answer, *re.split(r"=|\\in(?![a-zA-Z])|\\approx(?![a-zA-Z])", answer)[1:]):
        forms |= {text} if _value(text) else {text, *_PARTS.split(text)}  # commas of a number are between thousands
    for text in list(forms):
        plain = "".join(char for char, _, _ in _normal(text))
        while len(plain) > 2 and _BRACKETS.get(plain[0]) == plain[-1]:
            plain = plain[1:-1]
            forms.add(plain)
        forms.add(plain.strip("()[]"))
    return {text for text in forms if text.strip()}


def _normal(text: str) -> list[tuple[str, int, int]]:
    """A text as it is compared: characters, each with where it comes from."""
    found: list[tuple[str, int, int]] = []
    for match in _PIECE.finditer(text):
        if match["dropped"] is None:
            kept = r"\frac" if match["fraction"] else _SAME.get(match[0], match[0].casefold())
            found += [(char, *match.span()) for char in kept]
    return found


def _texts_in(trace: str, forms: set[str]) -> Iterator[tuple[int, int]]:
    """Where a solution writes one of some texts; not inside a word or a number: 5 is not in 15 or 5.2."""
    normal = _normal(trace)
    text = "".join(char for char, _, _ in normal)

    def joined(left: int) -> bool:  # two characters with nothing dropped between them
        (_, start, stop), (_, following, _) = normal[left : left + 2]
        return following in (start, stop)

    def open_before(first: int) -> bool:
        if first == 0 or not text[first].isalnum():
            return True
        decimal = text[first].isdigit() and text[first - 1] in ".," and first > 1 and text[first - 2].isdigit()
        return not (joined(first - 1) and (text[first - 1].isalnum() or decimal))

    def open_behind(last: int) -> bool:
        if last + 1 >= len(text) or not text[last].isalnum():
            return True
        following = text[last + 1 : last + 3]
        decimal = text[last].isdigit() and following[0] in ".," and following[1:].isdigit()
        return not ((following[0].isalnum() and joined(last)) or (decimal and joined(last + 1)))

    for wanted in {"".join(char for char, _, _ in _normal(form)) for form in forms} - {""}:
        first = text.find(wanted)
        while first >= 0:
            last = first + len(wanted) - 1
            if open_before(first) and open_behind(last):
                yield _closed(trace, normal[first][1], normal[last][2])
            first = text.find(wanted, first + 1)


def _closed(trace: str, start: int, stop: int) -> tuple[int, int]:
    """A span, with the braces behind it that it has opened."""
    while trace.count("{", start, stop) > trace.count("}", start, stop):
        rest = trace[stop:].lstrip()
        if not rest.startswith("}"):
            break
        stop = len(trace) - len(rest) + 1
    return start, stop


def _numbers_in(trace: str, forms: set[str]) -> Iterator[tuple[int, int]]:
    """Where a solution writes a number that equals an answer, or one that is in an answer of another kind."""
    equal: set[Fraction] = set()
    inside: set[Fraction] = set()
    for form in forms:
        value = _value(form)
        if value:
            equal |= value
        else:
            inside |= {abs(v) for match in _NUMBER.finditer(form) for v in _values(match)}
            inside |= {v for one in (_DIGITS, _DIGIT_GROUP) for part in one.finditer(form) for v in _plain(part[0])}
    for match in _NUMBER.finditer(trace):
        values = _values(match)
        # A minus may be a sign or stand between two numbers.
        turned = {-v for v in values} if match["sign"][:1] in ("-", "\u2212") else set()
        if (values | turned) & equal or {abs(v) for v in values} & inside:
            yield match.span()
        else:
            parts = [part for one in (_DIGITS, _DIGIT_GROUP) for part in one.finditer(match[0])]
            for part in parts:
                if _plain(part[0]) & (equal | inside):
                    yield match.start() + part.start(), match.start() + part.end()


def _value(text: str) -> set[Fraction]:
    """The number that a whole text is, in all readings; empty for any other text."""
    plain = re.sub(r"^\s*\\boxed\s*\{(.*)\}\s*$", r"\1", text)
    plain = (
        re.sub(r"\^?\s*\{?\s*(?:\\circ|\u00b0)\s*\}?|\\\)|\\\(|(?<=\d)\s*degrees?\s*$", "", plain).strip().strip("$")
    )
    match = _NUMBER.fullmatch(plain.strip().removesuffix(".").strip().lstrip("+"))
    return _values(match) if match else set()


def _values(match: re.Match[str]) -> set[Fraction]:
    """What a number that was found may be: a percentage is also its hundredth, `2\\frac13` a sum or a product."""
    groups = match.groupdict()
    arguments = [text for text in match.groups()[2:6] if text is not None]
    if groups["plain"] is not None:
        found = _plain(groups["plain"])
    else:
        top, bottom = arguments if len(arguments) == 2 else (groups["over"], groups["under"])
        found = {a / b for a in _plain(top) for b in _plain(bottom) if b}
        for whole in filter(None, (groups["whole"], groups["units"])):
            found |= {n + v for n in _plain(whole) for v in found} | {n * v for n in _plain(whole) for v in found}
    if groups["percent"]:
        found |= {v / 100 for v in found}
    return {-v for v in found} if groups["sign"][:1] in ("-", "\u2212") else found


def _plain(text: str) -> set[Fraction]:
    """The number that digits with separators are; empty where it is longer than any that was asked for."""
    negative = text.lstrip()[:1] in ("-", "\u2212")
    digits = re.sub(r"[^\d.]", "", text)
    if not digits.strip(".") or len(digits) > _LONGEST_NUMBER:
        return set()
    return {-Fraction(digits) if negative else Fraction(digits)}


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name}={value!r} is not allowed; give two numbers, the least and the largest")
    return value[0], value[1]
