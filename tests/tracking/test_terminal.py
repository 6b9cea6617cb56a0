"""The terminal's view: what it shows while decoding is what the rollout records, and text cannot command it."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rows import Progress
from rl4dlm.tracking.replay import OPEN, Slot, make_replay
from rl4dlm.tracking.terminal import Frame, LiveView, canvas_text, draw, replay_frames, write_svg
from tests.rollout.denoisers import PROMPTS, denoiser
from tests.tracking.rollouts import SETTINGS, Words, by_hand, decoded


def terminal(*, width: int = 80, height: int = 60) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)


def printed(frames: list[Frame], texts: dict[int, str], width: int = 80, lines: int | None = None) -> str:
    console = terminal(width=width)
    console.print(draw(frames, texts, width=width, lines=lines))
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["greedy", "sampled", "ends early", "takes back", "verifies", "replaces", "grows"])
def test_what_is_shown_live_is_what_is_recorded(name: str) -> None:
    seen: dict[tuple[int, int], Frame] = {}
    forwards = 2 if name == "sampled" else 1
    view = LiveView(Words(), ["p"] * len(PROMPTS), last_step=5, forwards_per_step=forwards, console=terminal())

    def watch(progress: Progress) -> None:
        view(progress)
        seen.update({(row, frame.steps): frame for row, frame in view.frames.items()})

    config = DecodingConfig(canvas_length=12, **SETTINGS[name])
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config, seed=4, on_step=watch)
    replay = make_replay(rollout, Words(), blocks=view.blocks.rows)
    assert len(seen) == sum(row.steps for row in replay.rows)
    for row in replay.rows:
        states = list(row.states())
        for step in range(1, row.steps + 1):
            frame, state = seen[row.row, step], states[step]
            assert frame.block == row.block(step)
            assert [(slot.token, slot.step) for slot in frame.slots] == [(slot.token, slot.step) for slot in state]
            if len(states[step - 1]) == len(state):
                assert [slot.mark for slot in frame.slots] == [slot.mark for slot in state]
            elif step > 1:  # what it started with was not reported
                assert frame.status == f"slots {len(states[step - 1])} → {len(state)}"
            for slot, expected in zip(frame.slots, state, strict=True):
                assert slot.probability == (expected.probability and pytest.approx(expected.probability, rel=1e-3))
        assert frame.forwards == rollout.nfe[row.row]


def test_live_drawing_fits_the_terminal_and_leaves_nothing_behind() -> None:
    console = terminal(width=40, height=20)
    with LiveView(Words([]), ["prompt"] * 5, last_step=5, delay=1e-9, console=console) as view:
        RolloutEngine(denoiser()).generate(PROMPTS, DecodingConfig(canvas_length=12, steps=6), on_step=view)
    drawn = console.file.getvalue()
    assert "step 6" in drawn and "NFE 6" in drawn and "row 1" in drawn
    assert "row 2" not in drawn and "3 more rows" in " ".join(drawn.split())
    assert view.blocks.rows.keys() == set(range(5)), "blocks are remembered for rows that are not shown, too"


def test_where_there_is_no_terminal_nothing_is_drawn() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with LiveView(Words(), ["p"] * 5, last_step=5, delay=60.0, console=console) as view:  # nor is there a delay
        RolloutEngine(denoiser()).generate(PROMPTS, DecodingConfig(canvas_length=12, steps=6), on_step=view)
    assert console.file.getvalue() == "" and set(view.blocks.rows) == set(range(5))


def test_each_thing_that_happens_looks_different() -> None:
    replay = make_replay(by_hand(), Words([]))
    texts = [printed(replay_frames(replay, step), replay.texts).splitlines()[2] for step in range(5)]
    shown = [line.strip("│ ") for line in texts]
    assert shown == ["░░░░", "░l░░", "no░░", "✗p+o░░", "qp░"]
    (frame,) = replay_frames(replay, 3)
    styles = [canvas_text(frame, replay.texts, "step").spans[i].style for i in range(6)]
    assert len({*styles}) == 4, "masked again, put in, written before, open"
    assert replay_frames(replay, 99)[0].status == "eos" and frame.status == ""
    assert (frame.steps, frame.forwards) == (3, 6)


@pytest.mark.parametrize("colour", ["step", "confidence"])
def test_colours_stand_for_what_they_should(colour: str) -> None:
    slots = [Slot(0, step=0, probability=0.99), Slot(1, step=9, probability=0.01), Slot(2)]
    frame = Frame(0, "", slots, 10, 9, 10, (1, 2))
    first, second, given = (span.style for span in canvas_text(frame, {0: "a", 1: "b", 2: "c"}, colour).spans)
    low, high = (first, second) if colour == "step" else (second, first)
    assert low.bgcolor.name == "#440154" and high.bgcolor.name == "#fde725"
    assert given.bgcolor is None and given.dim
    assert [bool(style.underline) for style in (first, second, given)] == [False, True, False]


def test_text_cannot_command_the_terminal() -> None:
    rollout = by_hand()
    rollout.prompt_ids = [list(range(3, 11))]
    rollout.trace.events.token[:2] = rollout.trace.events.token.new_tensor([7, 8])
    replay = make_replay(rollout, Words())
    out = "".join(printed(replay_frames(replay, step), replay.texts) for step in range(5))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028]", out)
    assert r"\x1b[2J" in out


def test_a_long_canvas_is_shown_around_the_first_open_slot() -> None:
    texts = {0: "word ", 1: "line\n", 2: "here"}
    slots = [Slot(i % 2, step=0, probability=0.5) for i in range(3000)]
    slots[1999:2001] = [Slot(2, step=0), Slot(OPEN)]
    frame = Frame(0, "prompt " * 500, slots, 1, 1, 1, None)
    out = printed([frame], texts, width=60, lines=12)
    panel = out.splitlines()
    assert len(panel) <= 12 + 2 and all(len(line) <= 60 for line in panel)
    assert "here░" in out and out.count("…") >= 2
    whole = printed([frame], texts, width=60)
    assert whole.count("word") + whole.count("line") == 2998


def test_the_focus_moves_with_the_active_block() -> None:
    texts = {0: "a" * 50}
    slots = [Slot(0, step=0)] * 50 + [Slot(OPEN)] * 50
    frame = Frame(0, "", slots, 1, 1, 1, (90, 100))
    assert "…" in printed([frame], texts, lines=8)
    done = replace(frame, slots=[Slot(0, step=0)] * 100)
    assert printed([done], texts, lines=8).count("a" * 50) > 2


def test_a_picture_needs_nothing_else(tmp_path: Path) -> None:
    replay = make_replay(decoded("takes back")[0], Words())
    for path in (tmp_path / "one.svg", tmp_path / "two.svg"):
        write_svg(path, replay_frames(replay, 3), replay.texts, "confidence")
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert "url(http" not in text and 'url("http' not in text and "@font-face" not in text
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert names <= {"svg", "style", "defs", "clipPath", "rect", "g", "text", "circle"}
    assert "✗" in text and "NFE" in text
