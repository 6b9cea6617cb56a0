"""The layout of the library: no import cycle, nothing imports upwards, no file is long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "rl4dlm"
LONGEST = 450

# Data goes from left to right, and a room imports only what is left of it.
ROOMS = ("models", "rollout", "likelihood", "training", "algorithms")

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(LIBRARY.rglob("*.py"))
}


def statements(body: list[ast.stmt], *, lazy: bool) -> Iterator[ast.stmt]:
    """Those that run when a module is imported; with `lazy` also those of functions. Never those for type checkers."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, lazy=lazy)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, None) or [], lazy=lazy)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, lazy=lazy)


def imported(module: str, *, lazy: bool = False) -> set[str]:
    """The modules of the library that a module imports."""
    found: set[str] = set()
    for node in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")).body, lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a module stands"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return {name for name in found if name in MODULES} - {module}


def room(module: str) -> str:
    return ([*module.split("."), ""])[1]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of a graph, [] if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph[node]):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_there_is_no_import_cycle() -> None:
    assert cycle({module: imported(module) for module in MODULES}) == []


def test_nothing_imports_upwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module in MODULES
        if room(module) in ROOMS
        for other in imported(module, lazy=True)
        if room(other) in ROOMS and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert upwards == []


def test_only_commands_import_commands() -> None:
    assert [name for name in MODULES if room(name) != "cli" and any(room(n) == "cli" for n in imported(name))] == []


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in MODULES.values()))
def test_no_file_is_long_and_each_says_what_it_owns(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"
    assert len(text.splitlines()) <= LONGEST


def test_algorithms_hold_papers_only() -> None:
    for module in MODULES:
        if module.startswith("rl4dlm.algorithms."):
            text = MODULES[module].read_text(encoding="utf-8")
            assert "Trainer(" in text and "_paper = {" in text, f"{module} has no trainer of a paper"
