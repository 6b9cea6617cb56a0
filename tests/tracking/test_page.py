"""The page: complete in itself, safe whatever a model wrote, small, and played as the rollout went."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.rollout.rollout import EventKind
from rl4dlm.tracking import page
from rl4dlm.tracking.page import page_html, write_page
from rl4dlm.tracking.replay import OPEN, Event, Replay, RowReplay, make_replay
from tests.tracking.rollouts import HOSTILE, SETTINGS, Words, by_hand, decoded

SCRIPT = Path(page.__file__).parent / "page" / "page.js"


class Elements(HTMLParser):
    """The elements of a page as a browser finds them: (name, attributes, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.closed = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))
        self.closed = False

    def handle_endtag(self, tag: str) -> None:
        self.closed = True

    def handle_data(self, data: str) -> None:
        if self.found and not self.closed:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def named(self, name: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for tag, attributes, text in self.found if tag == name]


def hostile_replay() -> Replay:
    """Hostile text wherever a replay has text."""
    rollout = by_hand()
    ids = list(range(3, 3 + len(HOSTILE)))
    rollout.prompt_ids = [ids]
    rollout.stop_reason = [HOSTILE[1]]
    rollout.schedule = HOSTILE[0]
    rollout.trace.events.token[:2] = rollout.trace.events.token.new_tensor(ids[:2])
    return make_replay(rollout, Words(), notes={0: {HOSTILE[0]: HOSTILE[2]}})


def embedded(elements: Elements) -> Any:
    ((_, data),) = [e for e in elements.named("script") if e[0].get("id") == "replay"]
    return json.loads(data)


def test_nothing_that_a_model_wrote_becomes_part_of_the_page() -> None:
    replay = hostile_replay()
    hostile, plain = Elements(page_html(replay)), Elements(page_html(make_replay(by_hand(), Words([]))))
    assert [(tag, attributes) for tag, attributes, _ in hostile.found] == [
        (tag, attributes) for tag, attributes, _ in plain.found
    ]
    assert embedded(hostile) == json.loads(json.dumps(replay.to_dict()))
    assert HOSTILE[0] in embedded(hostile)["rows"][0]["prompt"]
    data = page_html(replay).partition('id="replay">')[2].partition("</script>")[0]
    assert not set(data) & set("<>&\u2028\u2029")


def test_scripts_other_than_its_own_are_forbidden() -> None:
    elements = Elements(page_html(hostile_replay()))
    (policy,) = [a["content"] for a, _ in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))

    def named(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (script,) = [text for attributes, text in elements.named("script") if "type" not in attributes]
    ((_, style),) = elements.named("style")
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == named(script) and rules["style-src"] == named(style)
    assert not any(re.match("on|style$", name) for _, attributes, _ in elements.found for name in attributes)
    # The page's own script never makes elements of text.
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "setAttribute",
    ):
        assert word not in script


def test_it_needs_nothing_else() -> None:
    text = page_html(hostile_replay())
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    for _, attributes, _ in Elements(text).found:
        assert not {"src", "href", "srcset", "action"} & set(attributes)


def test_it_is_small(tmp_path: Path) -> None:
    def row(number: int, events: list[Event]) -> RowReplay:
        return RowReplay(number, number, "p" * 2000, "c" * 5000, [OPEN] * 1000, events, 256, 256, 0, "complete")

    def commit(i: int) -> Event:
        return Event(i * 256 // 1000 % 256, EventKind.COMMIT, i % 1000, 100_000 + i % 1000, 0.1234, 0.5678, 0.1234)

    texts = {100_000 + i: f" token{i}" for i in range(1000)}
    settled = Replay([row(0, [commit(i) for i in range(1000)])], texts, "s", "none", True, 0)
    write_page(tmp_path / "once.html", settled)
    assert (tmp_path / "once.html").stat().st_size < 150_000
    often = sorted([commit(i) for i in range(1000)] * 8, key=lambda event: event.step)
    write_page(tmp_path / "often.html", Replay([row(0, often)], texts, "s", "none", True, 0))
    assert (tmp_path / "often.html").stat().st_size < 700_000


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "page.html"
    write_page(target, make_replay(by_hand(), Words()))
    before = target.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_page(target, hostile_replay())
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == ["page.html"]


@pytest.fixture(scope="module")
def played() -> dict[str, tuple[Replay, Any]]:
    """Replays, and what the page's script makes of their rows; node stands in for a browser."""
    if shutil.which("node") is None:
        pytest.skip("there is no node to run the page's script with")
    replays = {"by hand": make_replay(by_hand(), Words(), blocks={0: [(0, 0, 2), (2, 2, 4)]})}
    for name in SETTINGS:
        rollout, blocks = decoded(name)
        replays[name] = make_replay(rollout, Words(), blocks=blocks.rows)
    code = f"""{SCRIPT.read_text(encoding="utf-8")}
    const play = (row) => ({{
      counts: counts(row),
      states: Array.from({{length: row.steps + 1}}, (_, step) => slotsAfter(row, step)),
      blocks: Array.from({{length: row.steps + 1}}, (_, step) => blockAt(row, step)),
    }});
    const replays = JSON.parse(require("fs").readFileSync(0, "utf-8"));
    console.log(JSON.stringify(replays.map((replay) => replay.rows.map(play))));"""
    given = json.dumps([replay.to_dict() for replay in replays.values()])
    outcome = subprocess.run(["node", "-e", code], input=given, capture_output=True, text=True, check=True)
    return {name: (replays[name], own) for name, own in zip(replays, json.loads(outcome.stdout), strict=True)}


@pytest.mark.parametrize("name", [*SETTINGS, "by hand"])
def test_its_script_plays_what_happened(played: dict[str, tuple[Replay, Any]], name: str) -> None:
    replay, found = played[name]
    for row, own in zip(replay.rows, found, strict=True):
        states = list(row.states())
        assert [[(slot["token"], slot["step"], slot["mark"]) for slot in state] for state in own["states"]] == [
            [(slot.token, slot.step, slot.mark) for slot in state] for state in states
        ]
        assert own["blocks"] == [list(row.block(step) or ()) or None for step in range(row.steps + 1)]
        marks = [[slot.mark for slot in state] for state in states[1:]]
        if name != "edits":  # where a step may write a slot and cut it off, which counts
            assert own["counts"]["written"] == [state.count("written") for state in marks]
        if name not in ("by hand", "edits", "grows"):  # cuts and slots that come and go count, too
            changed = [sum(state.count(mark) for mark in ("remasked", "replaced")) for state in marks]
            assert own["counts"]["changed"] == changed


def test_its_script_knows_what_was_changed_before(played: dict[str, tuple[Replay, Any]]) -> None:
    (row,) = played["by hand"][1]
    # At step 0 a token is taken back at once, which changes nothing; later slot 0 is masked again, slot 1 replaced.
    changed = [[slot["changed"] for slot in state] for state in row["states"]]
    assert changed[1] == [False] * 4
    assert changed[2] == [False, True, False, False]
    assert changed[3] == [True, False, False, True, False, False]
    assert changed[4] == [True, False, False]
