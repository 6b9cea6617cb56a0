"""`import rl4dlm`: quick, with every public name behind it, and each name where the editor's view says it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import rl4dlm

NAMES = [name for name in rl4dlm.__all__ if name != "__version__"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_no_heavy_library():
    heavy = {"accelerate", "datasets", "numpy", "peft", "torch", "transformers", "trl"}
    loaded = run_python("import sys, rl4dlm; print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    assert "rl4dlm" in loaded.split()
    assert heavy.isdisjoint(loaded.split())


def test_import_opens_no_socket():
    run_python(
        "import sys\n"
        "def no_socket(event, args):\n"
        "    assert not event.startswith('socket.'), event\n"
        "sys.addaudithook(no_socket)\n"
        "import rl4dlm\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves(name):
    value = getattr(rl4dlm, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__, f"{name} has no docstring"


def test_public_names_are_listed_once_and_shown():
    assert len(set(rl4dlm.__all__)) == len(rl4dlm.__all__)
    assert dir(rl4dlm) == sorted(rl4dlm.__all__)


def test_star_import_gives_the_public_names():
    printed = run_python("from rl4dlm import *; print(*sorted(name for name in dir() if name[:2] != '__'))")
    assert printed.splitlines()[-1].split() == sorted(NAMES)  # libraries print lines of their own


def test_editors_and_the_interpreter_see_the_same_names():
    tree = ast.parse(Path(rl4dlm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(typed) == sorted(NAMES)
    for name, where in typed.items():
        module, _, attribute = where.rpartition(".")
        assert getattr(rl4dlm, name) is getattr(import_module(module), attribute)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="rl4dlm.*'NoSuchTrainer'"):
        _ = rl4dlm.NoSuchTrainer
    with pytest.raises(ImportError, match="NoSuchTrainer"):
        from rl4dlm import NoSuchTrainer  # noqa: F401
