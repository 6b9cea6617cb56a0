"""Programs with packages beside the standard library: they can use them, and nothing else is open to them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rl4dlm.grading.sandbox import Call, Limits, Program, Result, SandboxError, levels, run_programs
from rl4dlm.grading.sandbox.isolation import LEVELS
from rl4dlm.grading.sandbox.pool import PreloadError, Sandbox

OURS = """
import json, os
SECRET = "only imported"
def read(path):
    with open(path) as file:
        return file.read()
def later():
    import own_helper
    return own_helper.VALUE
"""


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    if reason := levels.why_not(request.param):
        pytest.skip(f"this machine does not offer the level {request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module and another one that it imports late; beside it, a secret."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "own_module.py").write_text(OURS)
    (packages / "own_helper.py").write_text("VALUE = 7\n")
    (tmp_path / "secret").write_text("secret")
    monkeypatch.syspath_prepend(str(packages))
    return packages


def ask(sandbox: Sandbox, *expressions: str) -> list[Result]:
    program = Program("import own_module, os, socket", tuple(map(Call, expressions)))
    (results,) = sandbox.run([program], Limits(seconds=30.0), 120.0)
    return results


def test_modules_are_there_and_what_they_import_late(level: str, folder: Path) -> None:
    with Sandbox(level, 1, preload=("own_module:read", "numpy")) as sandbox:
        results = ask(sandbox, "own_module.later()", "__import__('numpy').arange(4).sum()", "own_module.read")
        assert [(result.status, result.value) for result in results] == [("value", 7), ("value", 6), ("data", None)]
        assert "OPENBLAS" not in str(ask(sandbox, "dict(os.environ)")[0].value)


def test_nothing_else_is_open(level: str, folder: Path) -> None:
    beside, here = str(folder.parent / "secret"), str(folder / "own_helper.py")
    refused = (f"own_module.read({beside!r})", "own_module.read('/etc/passwd')", "socket.socket()", "os.fork()",
               f"open({here!r}, 'a')", "os.listdir('/var')", "os.listdir('/proc')", "os.kill(os.getppid(), 0)",
               f"own_module.read({str(Path(__file__))!r})")  # fmt: skip
    with Sandbox(level, 1, preload=("own_module",)) as sandbox:
        assert [result.status for result in ask(sandbox, *refused)] == ["error"] * len(refused)
        assert ask(sandbox, f"own_module.read({here!r})")[0].value == "VALUE = 7\n"
        # Nothing of the checkout, but its name and the environment's where that lies in it: a way to packages.
        checkout = Path(__file__).parents[3]
        (listed,) = ask(sandbox, f"os.listdir({str(checkout)!r})")
        ways = {Path(sys.prefix), *Path(sys.prefix).parents}
        assert listed.status == "error" or {checkout / name for name in listed.value} <= ways
        (written,) = ask(sandbox, "open('new', 'w').write('x')")
        assert written.status == ("value" if level == "namespaces" else "error")  # an empty folder, in another place
    with Sandbox(level, 1) as alone:
        program = Program("", (Call("__import__('own_module')"), Call("__import__('numpy')")))
        assert [result.status for result in alone.run([program], Limits(), 60.0)[0]] == ["error", "error"]


def test_folder_of_the_whole_environment_within_the_library(level: str) -> None:
    # Where packages lie below the standard library, as in most installations without a virtual environment.
    with Sandbox(level, 1, preload=("numpy",)) as sandbox:
        program = Program("import numpy.polynomial", (Call("numpy.polynomial.Polynomial([1, 2])(3.0)"),))
        assert sandbox.run([program], Limits(seconds=30.0), 60.0) == [[Result("value", 7.0)]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "starts threads",
        ),
        ("raise ValueError('broken')", "ValueError: broken"),
    ],
)
def test_what_cannot_be_imported_is_named(
    level: str, folder: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own_module.py").write_text(text)
    with Sandbox(level, 1, preload=("own_module",)) as sandbox, pytest.raises(PreloadError, match=reason):
        ask(sandbox, "1")


def test_each_set_has_a_server_of_its_own() -> None:
    if levels.strongest_level() is None:
        pytest.skip("this machine offers no sandbox")
    program = Program("", (Call("__import__('numpy').__name__"),))
    assert run_programs([program], preload=("numpy",))[0][0] == Result("value", "numpy")
    assert run_programs([program])[0][0].status == "error"
    with pytest.raises(SandboxError, match="no_such_module_at_all could not be imported"):
        run_programs([program], preload=("no_such_module_at_all",))
