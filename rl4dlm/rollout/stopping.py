"""Ends that a caller waits for: texts after which nothing more of a row is wanted.

Owns what such an end is and where in a canvas it comes about. The engine asks for it by token ids; `StopStrings` and
`text_ends`, which makes them, are all that knows of text here. Rows whose end is there leave the batch, and what lies
behind it is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Stop(Protocol):
    """Where a row ends. It must be a pure function, and what it finds must not depend on what follows it."""

    def __call__(self, ids: Sequence[int]) -> int | None:
        """How many of these tokens, the written ones from the first slot on, there are up to the end; None: it is not
        among them."""
        ...


@dataclass(frozen=True)
class StopStrings:
    """The end of the first of some texts to occur.

    Args:
        decode: of a tokenizer: token ids to text, with special tokens if they shall be found, too.
        strings: any of them ends a row.

    Raises:
        ValueError: no text, or an empty one.
    """

    decode: Callable[[Sequence[int]], str]
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "strings", tuple(self.strings))
        if not self.strings or not all(isinstance(text, str) and text for text in self.strings):
            raise ValueError(f"strings={self.strings!r} is not allowed; name texts of at least one character")

    def __call__(self, ids: Sequence[int]) -> int | None:
        """See `Stop`. The token in which a text ends may go on behind it; `cut` takes that from the decoded text."""
        if not self._occurs(ids):
            return None
        low, high = 0, len(ids)  # it is not among the first `low`, and it is among the first `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._occurs(ids[:middle]) else (middle, high)
        return high

    def cut(self, text: str) -> str:
        """The text before the first of the strings in it."""
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]

    def _occurs(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)


@dataclass(frozen=True)
class Ends:
    """A row ends at the first of some stops, or with so many tokens.

    Args:
        stops: any of them ends a row. most: tokens of a row at most; None: as many as the canvas holds.
    """

    stops: tuple[Stop, ...]
    most: int | None = None

    def __call__(self, ids: Sequence[int]) -> int | None:
        """See `Stop`."""
        places = [place for place in (stop(ids) for stop in self.stops) if place is not None]
        if self.most is not None and len(ids) >= self.most:
            places.append(self.most)
        return min(places, default=None)


def text_ends(tokenizer: Any, strings: Sequence[str], most: int | None) -> tuple[Ends | None, StopStrings | None]:
    """Where rows end that stop at some texts or with so many tokens, and the texts that what is shown is cut at.

    A text that spells out a special token is looked for with these, all others without: the letters of a special
    token's name are no text. Raises ValueError for an empty text.
    """
    named = [text for text in strings if any(token in text for token in tokenizer.all_special_tokens)]
    plain = [text for text in strings if text not in named]
    shown, stops = None, list[Stop]()
    if plain:
        shown = StopStrings(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), tuple(plain))
        stops.append(shown)
    if named:
        stops.append(StopStrings(tokenizer.decode, tuple(named)))
    return Ends(tuple(stops), most) if stops or most is not None else None, shown


def stop_places(stop: Stop, canvas: Tensor, written: Tensor, ends: Collection[int]) -> Tensor:
    """After how many slots rows end, long `[R]`; -1 where they do not.

    Args:
        canvas: long `[R, W]`.
        written: bool `[R, W]`, slots whose tokens count. Those behind the first other one do not, nor do those from the
            first end-of-sequence token on, which ends a row by itself.
        ends: end-of-sequence tokens.
    """
    found = []
    for tokens, count in zip(canvas.tolist(), written.long().cumprod(-1).sum(-1).tolist(), strict=True):
        ids = tokens[:count]
        end = next((place for place, token in enumerate(ids) if token in ends), count)
        place = stop(ids[:end]) if end else None
        found.append(-1 if place is None else place)
    return torch.tensor(found, dtype=torch.long, device=canvas.device)


class Stops:
    """Where rows end, looked up once after each step.

    Args:
        stop: asked for each row. ends: end-of-sequence tokens.
    """

    def __init__(self, stop: Stop, ends: Collection[int]) -> None:
        self.stop, self.ends = stop, ends
        self._found: tuple[Tensor, Tensor] | None = None  # open slots, which nothing changes in place, and places

    def places(self, canvas: Tensor, masked: Tensor, length: Tensor) -> Tensor:
        """See `stop_places`; `masked` is bool `[R, W]`, `length` long `[R]`, slots that exist."""
        if self._found is None or self._found[0] is not masked:
            there = torch.arange(canvas.shape[1], device=canvas.device) < length[:, None]
            self._found = masked, stop_places(self.stop, canvas, ~masked & there, self.ends)
        return self._found[1]
