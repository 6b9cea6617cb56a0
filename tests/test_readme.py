"""What README and docs tell a user to type works: code runs, commands are understood, files and links exist.

Python blocks run, one document's blocks in order, unless `<!-- not run -->` stands before them. Shell blocks run where
`<!-- run -->` does, one document's in order and in one folder; the others are read.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"(?:<!-- (?P<mark>not run|run) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass
class Block:
    document: str
    language: str
    code: str
    mark: str | None


BLOCKS = [
    Block(name, match["language"], match["code"], match["mark"])
    for name, path in DOCUMENTS.items()
    for match in FENCE.finditer(path.read_text(encoding="utf-8"))
]
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in SHELL
    for line in block.code.replace("\\\n", " ").splitlines()
    if shlex.split(line, comments=True)
]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder to work in that has the checkout's files, and into which outputs may go."""
    for name in ("configs", "examples", "rewards", "trainers"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_blocks_are_found():
    assert any(block.document == "README.md" and block.language == "python" for block in BLOCKS)
    assert any(block.mark == "run" for block in SHELL)


@pytest.mark.parametrize("document", sorted({b.document for b in BLOCKS if b.language == "python"}))
def test_python_runs(document, checkout):
    blocks = [b.code for b in BLOCKS if b.document == document and b.language == "python" and b.mark != "not run"]
    (checkout / "blocks.py").write_text("\n".join(blocks))
    runpy.run_path(str(checkout / "blocks.py"), run_name="__main__")


# Six commands that import everything: half a minute each.
LONG = dict.fromkeys(("docs/own-task.md", "docs/first-run.md"), (pytest.mark.slow, pytest.mark.timeout(900)))


@pytest.mark.parametrize(
    "document",
    [pytest.param(d, marks=LONG.get(d, ())) for d in sorted({b.document for b in SHELL if b.mark == "run"})],
)
def test_shell_runs(document, checkout):
    # The commands of this environment, and not of another that may be on the path.
    for name, start in (("python", []), ("rl4dlm", ["-m", "rl4dlm.cli"])):
        command = checkout / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *start])} "$@"\n')
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for code in [b.code for b in SHELL if b.document == document and b.mark == "run"]:
        outcome = subprocess.run(
            ["bash", "-eu", "-c", code], cwd=checkout, env=environment, capture_output=True, text=True, timeout=280
        )
        assert outcome.returncode == 0, outcome.stderr[-2000:]


def test_commands_name_files_that_exist():
    missing = {
        word
        for command in COMMANDS
        for word in command
        if re.fullmatch(r"(configs|trainers|rewards|examples)/[\w./-]+", word.partition(":")[0])
        and not (ROOT / word.partition(":")[0]).exists()
    }
    assert not missing


def test_commands_of_rl4dlm_are_understood():
    from rl4dlm import cli

    commands = [command[1:] for command in COMMANDS if command[0] == "rl4dlm"]
    assert {command[0] for command in commands} >= {"train", "eval", "env"}
    for arguments in commands:
        if arguments[0] == "train":
            cli.launch_command(arguments[1:])
        else:
            cli._parser().parse_args(arguments)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {command[1] for command in COMMANDS if command[0] == "make" and len(command) > 1}
    assert used and used <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    path = DOCUMENTS[name]
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_page_is_in_the_index():
    index = DOCUMENTS["docs/index.md"].read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([\w-]+\.md)\)", index))
