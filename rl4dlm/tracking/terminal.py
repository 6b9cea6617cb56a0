"""Denoising in the terminal: canvases while they are decoded, and any step of a replay.

Owns how slots look. What happened to them is in `replay.py`; the page for a browser is `page.py`.
"""

from __future__ import annotations

import io
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.style import Style
from rich.text import Text
from torch import Tensor

from rl4dlm.files import write_text
from rl4dlm.tracking.replay import OPEN, BlockLog, Mark, Replay, Slot, token_texts

Colour = Literal["step", "confidence"]
COLOURS: tuple[Colour, ...] = ("step", "confidence")
"""What a token's colour stands for: the step at which it was written, or its probability then."""

PANEL_LINES = 7
"""Lines that a row takes at least: frame, prompt and a few lines of canvas."""

_SCALE = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")  # viridis
_MARKS: dict[Mark, Style] = {
    "remasked": Style(color="white", bgcolor="red", bold=True),
    "replaced": Style(color="white", bgcolor="magenta", bold=True),
    "inserted": Style(color="black", bgcolor="green", bold=True),
}
_GIVEN = Style(dim=True, italic=True)
_REFRESH = 0.05  # seconds
_PROMPT_CELLS = 300
_PICTURE_WIDTH = 100


@dataclass(frozen=True)
class Frame:
    """A row at some step.

    Args:
        row: its number. prompt: its text. slots: of the canvas.
        steps: made so far. last_step: what the colour scale ends with.
        forwards: made so far, if known. block: active slots `(start, stop)`, if known.
        status: one more thing to say, such as the reason why it stopped.
    """

    row: int
    prompt: str
    slots: Sequence[Slot]
    steps: int
    last_step: int
    forwards: int | None
    block: tuple[int, int] | None
    status: str = ""


def draw(
    frames: Sequence[Frame],
    texts: Mapping[int, str],
    *,
    colour: Colour = "step",
    width: int = 100,
    lines: int | None = None,
    hidden: int = 0,
) -> RenderableType:
    """Panels, one per row, and a legend.

    Args:
        frames: rows. texts: what to show for each token id.
        colour: what colours stand for.
        width: of the terminal, in cells. lines: that each panel may take; None shows whole canvases.
        hidden: rows that are not shown.
    """
    panels = [_panel(frame, texts, colour, width, lines) for frame in frames]
    return Group(*panels, _legend(colour, hidden))


def replay_frames(replay: Replay, step: int | None = None) -> list[Frame]:
    """The rows of a replay when `step` steps had been made; None, and rows that made fewer: at their end."""
    frames = []
    for row in replay.rows:
        made = row.steps if step is None else min(step, row.steps)
        states = list(row.states())
        status = row.stop_reason if made == row.steps else ""
        forwards = row.nfe * made // max(1, row.steps)
        last = max(1, row.steps - 1)
        frames.append(Frame(row.row, row.prompt, states[made], made, last, forwards, row.block(made), status))
    return frames


def write_svg(
    path: str | os.PathLike[str], frames: Sequence[Frame], texts: Mapping[int, str], colour: Colour = "step"
) -> None:
    """Writes a picture of what a terminal shows, without the web fonts that rich would link to."""
    console = Console(
        file=io.StringIO(), record=True, width=_PICTURE_WIDTH, force_terminal=True, color_system="truecolor"
    )
    console.print(draw(frames, texts, colour=colour, width=_PICTURE_WIDTH))
    picture = console.export_svg(title="rl4dlm decode", unique_id="decode")
    write_text(path, re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S))


class LiveView:
    """Shows rows while they are decoded; a callback for `RolloutEngine.generate(on_step=...)`, and a context manager.

    On a stream that is not a terminal nothing is drawn.

    Args:
        tokenizer: of the model. prompts: text of each row's prompt.
        last_step: the step that the colour scale ends with.
        forwards_per_step: 2 under classifier-free guidance.
        colour: what colours stand for. delay: seconds to wait after each step, to be able to follow.
        console: to draw on.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        last_step: int,
        forwards_per_step: int = 1,
        colour: Colour = "step",
        delay: float = 0.0,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console()
        self.blocks = BlockLog()
        self.frames: dict[int, Frame] = {}
        self._tokenizer, self._prompts, self._texts = tokenizer, prompts, dict[int, str]()
        self._last_step, self._forwards, self._colour, self._delay = last_step, forwards_per_step, colour, delay
        self._shown = min(len(prompts), max(1, (self.console.height - 2) // PANEL_LINES))
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._drawn_at = -math.inf

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, progress: Any) -> None:
        """Takes the engine's report on a step (`rl4dlm.rollout.rows.Progress`)."""
        self.blocks(progress)
        if not self.console.is_terminal:
            return
        for i, row in enumerate(progress.slots.tolist()):
            if row < self._shown:
                self.frames[row] = self._frame(progress, i, row)
        if self._delay or time.monotonic() - self._drawn_at > _REFRESH:
            self._live.update(self._drawing(), refresh=True)
            self._drawn_at = time.monotonic()
            time.sleep(self._delay)

    def _frame(self, progress: Any, i: int, row: int) -> Frame:
        slots, steps = live_slots(progress, i), int(progress.step[i])
        new = sorted({slot.token for slot in slots} - {OPEN} - self._texts.keys())
        self._texts.update(token_texts(self._tokenizer, new))
        before, status = self.frames.get(row), ""
        if before is not None and len(before.slots) == len(slots):
            slots = [_marked(old, now) for old, now in zip(before.slots, slots, strict=True)]
        elif before is not None:
            status = f"slots {len(before.slots)} → {len(slots)}"
        block = (int(progress.start[i]), int(progress.stop[i]))
        forwards = steps * self._forwards
        return Frame(row, self._prompts[row], slots, steps, self._last_step, forwards, block, status)

    def _drawing(self) -> RenderableType:
        frames = [self.frames[row] for row in sorted(self.frames)]
        lines = max(PANEL_LINES, (self.console.height - 2) // self._shown)
        hidden = len(self._prompts) - self._shown
        return draw(frames, self._texts, colour=self._colour, width=self.console.width, lines=lines, hidden=hidden)


def live_slots(progress: Any, i: int) -> list[Slot]:
    """The slots of the i-th row of a progress report; what was just written is marked."""

    def of(column: Tensor) -> list[Any]:
        return column[i, : int(progress.length[i])].tolist()

    last = int(progress.step[i]) - 1
    columns = (progress.canvas, progress.masked, progress.commit_step, progress.raw_log_prob)
    return [
        Slot(OPEN)
        if masked
        else Slot(token, step, math.exp(log_prob) if step >= 0 else None, "written" if step == last else "")
        for token, masked, step, log_prob in zip(*map(of, columns), strict=True)
    ]


def _marked(before: Slot, now: Slot) -> Slot:
    if now.token == OPEN:
        return Slot(OPEN, mark="remasked") if before.token != OPEN else now
    if now.mark == "written" and before.token != OPEN:
        return Slot(now.token, now.step, now.probability, "replaced")
    return now


# --- looks ------------------------------------------------------------------------------------------------------------


def _panel(frame: Frame, texts: Mapping[int, str], colour: Colour, width: int, lines: int | None) -> Panel:
    counted = [f"step {frame.steps}"]
    if frame.forwards is not None:
        counted.append(f"NFE {frame.forwards}")
    if frame.block is not None:
        counted.append(f"block {frame.block[0]}–{frame.block[1] - 1}")
    counted.append(f"{sum(slot.token == OPEN for slot in frame.slots)} of {len(frame.slots)} open")
    if frame.status:
        counted.append(frame.status)
    prompt = frame.prompt.replace("\n", "↵")
    prompt = prompt if len(prompt) <= _PROMPT_CELLS else f"…{prompt[-_PROMPT_CELLS:]}"
    shown = Text(prompt, style="dim", no_wrap=lines is not None, overflow="ellipsis")
    room = None if lines is None else max(1, lines - 3) * max(1, width - 4)
    return Panel(
        Group(shown, canvas_text(frame, texts, colour, room, max(1, width - 4))),
        title=Text(f"row {frame.row}"),
        title_align="left",
        subtitle=Text(" · ".join(counted)),
        subtitle_align="left",
        border_style="dim",
        width=width,
    )


def canvas_text(
    frame: Frame, texts: Mapping[int, str], colour: Colour, room: int | None = None, width: int = 96
) -> Text:
    """The slots of a row as styled text, those around the first open one if they do not fit into `room` cells."""
    pieces = [_piece(slot, texts) for slot in frame.slots]
    first, last = 0, len(pieces)
    if room is not None:
        first, last = _window(pieces, _focus(frame), room - 2, width)
    text = Text("…" if first else "")
    for position in range(first, last):
        text.append(pieces[position], _style(frame, position, colour))
    return text.append("…" if last < len(pieces) else "")


def _piece(slot: Slot, texts: Mapping[int, str]) -> str:
    if slot.token == OPEN:
        return {"remasked": "✗", "inserted": "+"}.get(slot.mark, "░")
    return texts[slot.token].replace("\n", "↵\n")


def _style(frame: Frame, position: int, colour: Colour) -> Style:
    slot = frame.slots[position]
    active = frame.block is not None and frame.block[0] <= position < frame.block[1]
    place = Style(underline=active)
    if slot.mark in _MARKS:
        return _MARKS[slot.mark] + place
    if slot.token == OPEN:
        return Style(color="cyan" if active else None, dim=not active) + place
    if slot.step < 0:
        return _GIVEN + place
    value = slot.step / max(1, frame.last_step) if colour == "step" else slot.probability
    shade = Style() if value is None else _shade(value)
    return shade + place + Style(bold=slot.mark == "written")


def _shade(value: float) -> Style:
    """A place on the scale from 0 to 1, with letters that can be read on it."""
    index = min(len(_SCALE) - 1, max(0, int(value * len(_SCALE))))
    return Style(bgcolor=_SCALE[index], color="#ffffff" if index < len(_SCALE) // 2 else "#000000")


def _focus(frame: Frame) -> int:
    """Where to look: the first open slot, of the active block if there is one."""
    start = frame.block[0] if frame.block is not None else 0
    for position in range(start, len(frame.slots)):
        if frame.slots[position].token == OPEN:
            return position
    return 0


def _window(pieces: Sequence[str], focus: int, room: int, width: int) -> tuple[int, int]:
    """Slots `first..last - 1` around a focus that take at most `room` cells; a line break may take a whole line."""
    costs = [cell_len(piece) + (width if "\n" in piece else 0) for piece in pieces]
    first, last, used = focus, focus, 0
    while first > 0 and used + costs[first - 1] <= room // 3:
        first -= 1
        used += costs[first]
    while last < len(pieces) and used + costs[last] <= room:
        used += costs[last]
        last += 1
    while first > 0 and used + costs[first - 1] <= room:
        first -= 1
        used += costs[first]
    return first, last


def _legend(colour: Colour, hidden: int) -> Text:
    low, high = ("early", "late") if colour == "step" else ("unsure", "sure")
    legend = Text(f"{low} ")
    for shade in _SCALE:
        legend.append(" ", Style(bgcolor=shade))
    legend.append(f" {high}   ")
    for piece, style, meaning in (
        ("░", Style(dim=True), "open"),
        ("░", Style(color="cyan", underline=True), "active block"),
        ("✗", _MARKS["remasked"], "masked again"),
        ("a", _MARKS["replaced"], "replaced"),
        ("+", _MARKS["inserted"], "put in"),
        ("a", _GIVEN, "given"),
    ):
        legend.append(piece, style).append(f" {meaning}   ")
    if hidden > 0:
        legend.append(f"{hidden} more rows")
    legend.rstrip()
    return legend
