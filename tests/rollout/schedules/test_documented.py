"""`docs/decoding.md` names every schedule and every setting with its default, and its table says what is so."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.rollout.decoding import schedule_arguments
from rl4dlm.rollout.schedules import registry
from tests.rollout.schedules.examples import LENGTH, decoding, judge, parts, token_filter

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "decoding.md").read_text(encoding="utf-8")
OURS = [name for name in registry.names() if registry.lookup(name).build.__module__.startswith("rl4dlm.")]
MASKED = [name for name in OURS if registry.lookup(name).noise == "mask"]


def sections() -> list[tuple[str, str]]:
    """Headings of the second level, and what follows each."""
    pieces = re.split(r"^## (.*)$", PAGE, flags=re.M)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def names_in(text: str) -> list[str]:
    return [name for name in re.findall(r"`(\w+)`", text) if name in OURS]


def tables(heading: str, body: str) -> list[tuple[list[str], dict[str, str]]]:
    """Tables of settings: the schedules that each is about, and its settings with their defaults as written.

    The header or the line before says whose settings they are, else the heading does.
    """
    found = []
    for before, table in re.findall(r"((?:^.*\n)?)\n?((?:^\|.*\n)+)", body, flags=re.M):
        rows = [[cell.strip() for cell in row.strip().strip("|").split(" | ")] for row in table.splitlines()]
        if not rows[0][0].startswith("setting"):
            continue
        about = names_in(rows[0][0]) or (names_in(before) if before.strip().endswith(":") else names_in(heading))
        found.append((about, {row[0].strip("`"): row[1].strip("`") for row in rows[2:]}))
    return found


DOCUMENTED: dict[str, dict[str, str]] = {
    name: settings for heading, body in sections() for about, settings in tables(heading, body) for name in about
}


def as_written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_documented_with_its_default(name: str):
    settings = [field for field in dataclasses.fields(schedule_arguments(name)) if field.init]
    assert DOCUMENTED.get(name, {}) == {field.name: as_written(field.default) for field in settings}


@pytest.mark.parametrize("name", OURS)
def test_every_schedule_has_a_section_with_its_differences(name: str):
    (body,) = (body for heading, body in sections() if name in names_in(heading) or f"setting of `{name}`" in body)
    assert re.search(r"^Differences?: ", body, flags=re.M) or "No code is published" in body
    entry = registry.lookup(name)
    papers = set(re.findall(r"\d{4}\.\d{5}", __import__(entry.build.__module__, fromlist=["_"]).__doc__))
    assert not papers or papers & set(re.findall(r"\d{4}\.\d{5}", body)) or name == "entropy_bound_canvas"


def overview() -> dict[str, list[str]]:
    (body,) = (body for heading, body in sections() if heading == "What each is like")
    rows = [row.strip().split("|")[1:-1] for row in body.splitlines() if row.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


NEEDED: dict[str, dict[str, Any]] = {
    "edlm": {"energy": judge, "drafts": 1},
    "guided": {"guide": judge},
    "levenshtein": {"delete_token_id": 5, "insert_token_id": 6},
    "learn2pd": {"filter_path": lambda: token_filter(LENGTH)},
}
"""Settings that have no default that would do."""


@pytest.mark.parametrize("name", MASKED)
def test_the_overview_says_what_is_so(name: str):
    schedule = parts(decoding(name, steps=None, schedule_args=NEEDED.get(name, {})))
    grid = schedule.blocks.on_grid and not schedule.whole
    replaced = schedule.replace is not None or schedule.verify is not None
    expected = [schedule.monotone, not schedule.whole, grid, not schedule.moves, not (schedule.moves or replaced)]
    assert overview()[name][1:6] == ["yes" if value else "no" for value in expected]


def test_the_overview_is_complete():
    assert sorted(overview()) == MASKED
    assert all(len(cells) == 7 for cells in overview().values())


def test_each_schedule_has_one_section():
    headed = list(itertools.chain.from_iterable(names_in(heading) for heading, _ in sections()))
    assert len(headed) == len(set(headed))
