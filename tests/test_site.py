"""The documentation's site: every page has its place, the API reference every public name, and links their copies.

Whether the site builds, with every link and anchor, is what `make docs` checks.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from benchmarks import gallery

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = re.findall(r": (\S+\.md)$", nav, re.M)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_api_reference_has_every_public_name(hooks):
    assert hooks.missing() == []
    modules = [module for group in hooks.API.values() for module in group]
    assert len(set(modules)) == len(modules)
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module
    pages = {path: text for path, _, text in hooks.api_pages()}
    assert len(pages) == 1 + len(hooks.API) + len(hooks.algorithms())
    assert "::: rl4dlm.algorithms.wd1" in pages["api/algorithms/wd1.md"]
    for target in re.findall(r"\]\(([^)]+)\)", pages["api/index.md"]):
        assert f"api/{target}" in pages


def test_links_out_of_the_pages_lead_to_copies(hooks):
    text = "[a](../SECURITY.md#x) [b](../rewards/speed.py), ![c](../benchmarks/x.png) `[d](../e.md)` [f](models.md#g)"
    assert hooks.within_site(text, "docs/launching.md") == (
        "[a](repository/SECURITY.md#x) [b](repository/rewards/speed.py.md), ![c](repository/benchmarks/x.png) "
        "`[d](../e.md)` [f](models.md#g)"
    )
    # A copy is deeper than the file, and its own links are moved, too.
    text = "[a](docs/sandbox.md#x) [b](rewards/speed.py) [c](CHANGELOG.md) [d](https://x.org/a.md)"
    assert hooks.within_site(text, "SECURITY.md") == (
        "[a](../sandbox.md#x) [b](rewards/speed.py.md) [c](CHANGELOG.md) [d](https://x.org/a.md)"
    )


def test_every_file_that_a_page_links_to_is_copied(hooks):
    copies = hooks.copies()
    assert copies["repository/SECURITY.md"] == ROOT / "SECURITY.md"
    for page in DOCS.glob("*.md"):
        for path in hooks.outside(page.read_text(encoding="utf-8"), "docs").values():
            assert (ROOT / path).is_file(), f"{page.name} links to {path}, which is no file"
            assert hooks._address(path) in copies


def test_pipes_in_code_in_tables_are_shown_without_a_backslash(hooks):
    assert hooks.within_site("| `<\\|mask\\|>` | a \\| b |", "docs/models.md") == "| `<|mask|>` | a \\| b |"


def test_the_gallery_is_what_its_script_makes(hooks):
    """Its pages are there and small, and one of them, decoded again, is the same."""
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    files = {path.stem: path for path in (DOCS / "gallery").iterdir()}
    assert files.keys() == gallery.SHOWN.keys()
    shown = {}
    for name, path in files.items():
        assert path.suffix == ".html" and path.stat().st_size < 200_000 and f"(gallery/{name}.html)" in page
        data = re.search(r'<script type="application/json" id="replay">(.*?)</script>', path.read_text("utf-8"), re.S)[
            1
        ]
        shown[name] = json.loads(data)
        assert len(shown[name]["rows"]) == gallery.SHOWN[name].prompts
    again = gallery.replay(gallery.SHOWN["sudoku-four"])
    assert gallery.line("sudoku-four", gallery.SHOWN["sudoku-four"], again) in page
    assert [row["completion"] for row in shown["sudoku-four"]["rows"]] == [row.completion for row in again.rows]
    assert [row["nfe"] for row in shown["sudoku-four"]["rows"]] == [row.nfe for row in again.rows]
    framed = hooks.with_frames(page)
    assert re.findall(r'<iframe src="gallery/([\w-]+).html"', framed) == list(gallery.SHOWN)
