"""No attack on the machine has its way, at any level that this machine offers.

All attacks on a level run as one batch, in whose wake an honest program must still be served; then each is judged.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl4dlm.grading.sandbox import Call, Feed, Limits, Program, Result
from rl4dlm.grading.sandbox.pool import Sandbox
from tests.grading.sandbox.attacks import ATTACKS, LATE, SETUP
from tests.grading.sandbox.conftest import ROOT, descendants

HONEST = Program("def f(x):\n    return x + 1\n", (Call("f(1)"),))
SECRET = "the trainer's own"


class Field:
    """What the attacks aim at, and their results."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.secret = folder / "secret"
        self.secret.write_text(SECRET)
        self.before = self.secret.stat()
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.unix.bind(f"\0rl4dlm-test-{os.getpid()}-{sandbox.level}")
        self.listeners = (self.tcp, self.udp, self.unix)
        known = {
            "FILE": str(self.secret),
            "FOLDER": str(folder),
            "PROJECT": str(ROOT),
            "PID": os.getpid(),
            "PGID": os.getpgrp(),
            "PORT": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "SOCKET": self.unix.getsockname(),
        }
        setup = SETUP + "".join(f"{name} = {value!r}\n" for name, value in known.items())
        named = {**ATTACKS, **LATE}
        programs = [Program(source, (Call("attack()"),), setup) for source in named.values()]
        rows = sandbox.run(programs, Limits(seconds=0.6), 120.0)
        self.results = dict(zip(named, [row[0] for row in rows], strict=True))
        ((self.honest,),) = sandbox.run([HONEST], Limits(), 120.0)
        self.left = {pid for server in sandbox._servers for pid in descendants(server.process.pid)}

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


@pytest.fixture(scope="module")
def field(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = Field(sandbox, tmp_path_factory.mktemp("trainer"))
    yield made
    made.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(field: Field, name: str) -> None:
    result = field.results[name]
    assert result.status in {"error", "ended", "memory", "output", "data", "timeout"}, result
    assert result.value is None
    mistakes = ("NameError", "SyntaxError", "AttributeError", "TypeError", "ImportError", "ModuleNotFoundError")
    assert not result.message.startswith(mistakes)  # of the attack itself: it would say nothing about the sandbox


@pytest.mark.parametrize("name", LATE)
def test_attack_on_time_ends(field: Field, name: str) -> None:
    assert field.results[name].status == "timeout"


def test_nothing_of_the_machine_has_changed(field: Field) -> None:
    assert field.honest == Result("value", 2)
    assert field.left == set()
    assert field.secret.read_text() == SECRET
    after = field.secret.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (
        field.before.st_mode,
        field.before.st_mtime,
        field.before.st_uid,
    )
    assert [path.name for path in field.secret.parent.iterdir()] == ["secret"]
    for listener in field.listeners:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept() if listener is field.tcp else listener.recv(1)


def test_output_is_bounded_and_cannot_be_an_answer(sandbox: Sandbox) -> None:
    flood = "import sys\nfor _ in range(1000): sys.stdout.write('x' * 100_000)\n"
    written = (
        "import os\ndef attack():\n    for number in range(1, 64):\n"
        '        try: os.write(number, b\'["value", ""]\\n42\')\n        except OSError: pass\n    return 1\n'
    )
    lied = 'import os\nprint(\'PASSED\')\nos.write(1, b\'{"part": 0, "status": "value"}\')\n'
    lied += "def attack(): raise ValueError\n"
    programs = [Program(flood, (Feed(""),)), Program(flood + "def attack(): return 1", (Call("attack()"),))]
    programs += [Program(written, (Call("attack()"),)), Program(lied, (Call("attack()"),))]
    (flooded,), (quiet,), (pipe,), (told,) = sandbox.run(programs, Limits(), 60.0)
    assert flooded.status in ("output", "error") and flooded.value is None
    assert quiet == Result("value", 1)  # printed text goes nowhere where a value is asked for
    assert pipe.status == "ended"
    assert told.status == "error"


def test_programs_see_nothing_of_each_other(sandbox: Sandbox) -> None:
    leave = "import builtins, sys, os\nbuiltins.left = 1\nsys.left = 1\nos.environ['left'] = '1'\n"
    leave += "try: open('left', 'w').write('1')\nexcept OSError: pass\ndef f(): return 1\n"
    look = "import builtins, sys, os\n"
    look += "def f(): return [hasattr(builtins, 'left'), hasattr(sys, 'left'), 'left' in os.environ]\n"
    look += "def g(): return os.path.exists('left')\n"
    first, second = sandbox.run(
        [Program(leave, (Call("f()"),)), Program(look, (Call("f()"), Call("g()")))], Limits(), 60.0
    )
    assert first == [Result("value", 1)]
    assert second == [Result("value", [False] * 3), Result("value", False)]


def test_parts_see_the_program_freshly_loaded(sandbox: Sandbox) -> None:
    program = Program(
        "seen = []\ndef f(x):\n    seen.append(x)\n    return seen\n", (Call("f(1)"), Call("f(2)"), Call("f(3)"))
    )
    assert sandbox.run([program], Limits(), 60.0) == [[Result("value", [number]) for number in (1, 2, 3)]]


def test_wrong_part_does_not_cost_the_others_theirs(sandbox: Sandbox) -> None:
    source = "import os\ndef f(x):\n    if x == 1: os._exit(3)\n    if x == 2: os.kill(os.getpid(), 11)\n    return x\n"
    (results,) = sandbox.run([Program(source, tuple(Call(f"f({x})") for x in range(4)))], Limits(), 60.0)
    assert [result.status for result in results] == ["value", "ended", "ended", "value"]
