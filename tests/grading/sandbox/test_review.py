"""What a review tried against the sandbox itself, at each level."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from rl4dlm.grading.sandbox import Call, Check, Feed, Limits, Program, Result, batch as batches, pool, seccomp
from rl4dlm.grading.sandbox.batch import Batch
from rl4dlm.grading.sandbox.kernel import MACHINE
from rl4dlm.grading.sandbox.pool import Sandbox

_ROWS = [
    *seccomp.ALLOWED.values(), *(row[0] for row in seccomp.CHECKED.values()), *seccomp._TO_ITSELF.values(),
    *(row[0] for row in seccomp.OPENING.values()), seccomp._CLONE, seccomp._CLONE3, seccomp._SOCKETPAIR,
]  # fmt: skip
_UPROBES = (335, 336)  # the kernel lets them by every filter, and they do nothing outside a probe
_SWEEP = f"""
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*numbers):
    return libc.syscall(*[ctypes.c_long(n) for n in (*numbers, *[0] * (7 - len(numbers)))])
def sweep(base):
    left = set({sorted({row[0] for row in _ROWS if row[0] is not None} | set(_UPROBES))}) if base == 0 else set()
    made = []
    for number in range(700):
        if number not in left and (call(base + number) >= 0 or ctypes.get_errno() != errno.EPERM):
            made.append(number)
    return made
def arguments():
    parent, itself, high = os.getppid(), os.getpid(), 1 << 32
    tries = [
        (72, 0, 10, 9), (72, 0, 8, parent), (72, 3, 1024, 1), (72, 3, 1026, 1), (72, 3, 1031, 1 << 20), (72, 0, 15, 0),
        (16, 0, 0x5412, 0), (16, 3, 0x5452, 0), (16, 3, 0x40049409, 3), (16, 3, 0x8902, 0),
        (157, 4, 1), (157, 22, 1), (157, 0x59616D61, -1), (157, 1, 0), (157, 35, 1), (157, 36, 1), (157, high | 4, 1),
        (302, parent, 7), (302, high | parent, 7), (62, high | parent, 0), (62, -itself, 0), (234, parent, parent, 0),
        (56, 17), (56, 0x100 | 17), (56, 0x10010900), (56, 0x8000 | 17),
        (53, 1, 2, 0, 0), (53, 1, 5, 0, 0), (53, 2, 1, 0, 0), (53, 1, 2 | 0o2000000, 0, 0),
        (285, 3, 0, 0, 1 << 28), (285, 3, 1, 0, 1 << 28), (77, 3, 1 << 34),
    ]
    return [one for one in tries if call(*one) >= 0]
"""


@pytest.mark.skipif(MACHINE != "x86_64", reason="the numbers are those of x86_64")
def test_no_other_system_call_is_let_through(sandbox: Sandbox) -> None:
    program = Program(_SWEEP, (Call("sweep(0)"), Call("sweep(0x40000000)"), Call("arguments()")))
    assert sandbox.run([program], Limits(), 60.0) == [[Result("value", [])] * 3]


FEEDS = {
    "exit": ("print(1)\nexit()", "", "1"),
    "quit": ("print(1)\nquit(0)", "", "1"),
    "thread_that_is_not_joined": (
        "import threading, time\ndef main():\n    time.sleep(0.1)\n    print(1)\nthreading.Thread(target=main).start()",
        "", "1",
    ),
    "atexit": ("import atexit\natexit.register(lambda: print(1))", "", "1"),
    "mode": ("import sys\nprint(sys.stdin.mode, sys.stdout.mode)", "", "r w"),
    "peek": ("import sys\nprint(sys.stdin.buffer.peek(1)[:1].decode())", "abc", "a"),
    "wrapped_anew": ("import io, sys\nsys.stdin = io.TextIOWrapper(sys.stdin.buffer)\nprint(input())", "1\n", "1"),
    "stdout_wrapped_anew": (
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, write_through=True)\nprint(1)", "", "1",
    ),
    "all_at_once": ("import io, os\nread = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\n"
                    "print(int(read()) + int(read()))", "1\n2\n", "3"),
    "own_file": ("out = open(1, 'w', closefd=False)\nout.write('1')", "", "1"),
    "fast_streams": (
        "import os, sys\nfrom io import BytesIO, IOBase\nclass FastIO(IOBase):\n    newlines = 0\n"
        "    def __init__(self, file):\n        self._fd = file.fileno()\n        self.buffer = BytesIO()\n"
        "        self.writable = 'x' in file.mode or 'r' not in file.mode\n"
        "        self.write = self.buffer.write if self.writable else None\n"
        "    def readline(self):\n        while self.newlines == 0:\n"
        "            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))\n"
        "            self.newlines = b.count(b'\\n') + (not b)\n            ptr = self.buffer.tell()\n"
        "            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)\n"
        "        self.newlines -= 1\n        return self.buffer.readline()\n"
        "    def flush(self):\n        if self.writable:\n            os.write(self._fd, self.buffer.getvalue())\n"
        "            self.buffer.truncate(0), self.buffer.seek(0)\n"
        "class IOWrapper(IOBase):\n    def __init__(self, file):\n        self.buffer = FastIO(file)\n"
        "        self.flush = self.buffer.flush\n        self.writable = self.buffer.writable\n"
        "        self.write = lambda s: self.buffer.write(s.encode('ascii'))\n"
        "        self.readline = lambda: self.buffer.readline().decode('ascii')\n"
        "sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)\n"
        "print(int(sys.stdin.readline()) + 1)", "1\n", "2",
    ),
    "file": ("print(bool(__file__))", "", "True"),
    "byte_order_mark": ("\ufeffprint(1)", "", "1"),
    "reads_all": ("print(len(open(0).read()))", "abc", "3"),
    "buffer": ("import sys\nprint(sys.stdin.buffer.readline().decode().strip())", "a\nb\n", "a"),
    "deep_in_a_thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "def g(n): return n and 1 + g(n - 1)\nt = threading.Thread(target=lambda: print(g(50_000)))\n"
        "t.start(); t.join()", "", "50000",
    ),
    "asyncio": ("import asyncio\nasync def m(): print(1)\nasyncio.run(m())", "", "1"),
    "exit_status_none": ("import sys\nprint(1)\nsys.exit(None)", "", "1"),
    "unicode": ("print('\u00e9\u4e2d')", "", "\u00e9\u4e2d"),
}  # fmt: skip


@pytest.fixture(scope="module")
def printed(sandbox: Sandbox) -> dict[str, Result]:
    rows = sandbox.run([Program(source, (Feed(given),)) for source, given, _ in FEEDS.values()], Limits(), 60.0)
    return {name: row[0] for name, row in zip(FEEDS, rows, strict=True)}


@pytest.mark.parametrize("name", FEEDS)
def test_honest_script_is_run(printed: dict[str, Result], name: str) -> None:
    assert (printed[name].status, str(printed[name].value).strip()) == ("value", FEEDS[name][2])


def test_threads_are_limited(sandbox: Sandbox) -> None:
    source = (
        "import threading\nthreading.stack_size(32768)\ndef f():\n    made, end = 0, threading.Event()\n    try:\n"
        "        for _ in range(200):\n            threading.Thread(target=end.wait, daemon=True).start()\n"
        "            made += 1\n    except RuntimeError: pass\n    return made\n"
    )
    ((result,),) = sandbox.run([Program(source, (Call("f()"),))], Limits(), 60.0)
    assert isinstance(result.value, int) and result.value < 100


def test_no_thread_where_their_number_is_not_limited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (
        "from rl4dlm.grading.sandbox import isolation\nisolation._limited = lambda: False\n"
        "isolation._become_nobody = lambda readable: 0\nserver.main()"
    )
    monkeypatch.setattr(pool, "_BOOT", pool._BOOT.replace("server.main()", unlimited))
    source = "import threading\ndef f(): threading.Thread(target=print).start()\n"
    with Sandbox(sandbox.level, 1) as alone:
        ((fine, threaded),) = alone.run([Program(source, (Call("1 + 1"), Call("f()")))], Limits(), 60.0)
    assert (fine.value, threaded.message) == (2, "RuntimeError: can't start new thread")


def test_slow_program_does_not_starve_the_others(sandbox: Sandbox) -> None:
    slow = Program(
        "import time\ndef f(x):\n    time.sleep(0.45)\n    return x\n", tuple(Call(f"f({n})") for n in range(20))
    )
    honest = Program("def f(x): return x\n", (Call("f(1)"),))
    with Sandbox(sandbox.level, 1) as alone:
        first, *others = alone.run([slow, honest, honest], Limits(), 3.0)
    assert [row[0].status for row in others] == ["value", "value"]
    assert first[0].status == "value"  # what it had answered when the time was over


def test_server_that_lags_behind_does_not_end_the_training() -> None:
    with Sandbox("landlock", 400) as wide:
        honest = Program("def f(): return 1", (Call("f()"),))
        wide.run([honest], Limits(), 60.0)
        server = wide._servers[0].process.pid
        os.kill(server, signal.SIGSTOP)
        timer = threading.Timer(1.0, os.kill, (server, signal.SIGCONT))
        timer.start()
        try:
            batch = Batch(wide._server, 400, [honest] * 350, Limits(), 30.0)
            batch._look_at_syntax = lambda: None  # type: ignore[method-assign]
            batch.run()
        finally:
            timer.join()


def test_check_whose_program_was_lost_is_lost() -> None:
    program = Program("def f(x): return x", (Check("assert f(1) == 1", ("f",)),))
    batch = Batch(lambda: None, 1, [program], Limits(), 1.0)  # type: ignore[arg-type, return-value]
    job = batch.waiting[0]
    job.runs = batch._runs(job)
    job.runs[0].status, job.runs[0].failed = -1, "clone: Resource temporarily unavailable"
    job.runs[1].status, job.runs[1].answers[0] = 0, Result("gone")
    assert batch._checked(job, job.runs[1].result(0)).status == "lost"


def test_slow_programs_get_no_more_than_their_share() -> None:
    slow = Program("import time\ndef f(x):\n    time.sleep(0.9)\n", tuple(Call(f"f({n})") for n in range(20)))
    checked = Program("import time\ndef f(x):\n    time.sleep(0.9)\n", (Check("f(1)\nf(1)", ("f",)),) * 20)
    honest = Program("def f(x): return x\n", (Call("f(1)"),))
    with Sandbox("landlock", 1) as alone:
        rows = alone.run([slow, checked, *[honest] * 4], Limits(), 5.0)
    assert [[result.status for result in row] for row in rows[2:]] == [["value"]] * 4
    assert {result.status for row in rows[:2] for result in row} <= {"value", "timeout"}
    assert all("timeout" in [result.status for result in row] for row in rows[:2])


def bomb(depth: int) -> str:
    lines = [f"{' ' * level}try:\n{' ' * level} pass\n{' ' * level}finally:" for level in range(depth)]
    return "\n".join([*lines, " " * depth + "pass"])


def test_source_that_takes_long_to_compile(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_HURRY", 60.0)  # so that the processor's time alone counts
    monkeypatch.setattr(batches, "_LOOK", 120.0)
    limits = Limits(seconds=60.0, program_seconds=120.0)
    honest = Program("def f(x): return x\n", (Call("f(1)"),))
    wrong = Program("def f(:", (Call("f(1)"),))
    bombs = [Program(bomb(18), (Call("1"), Feed("")))]
    with Sandbox(sandbox.level, 1) as alone:
        batch = Batch(alone._server, 1, [*bombs, *[honest] * 8, wrong], limits, 240.0)
        started: list[int] = []
        start = batch._start
        batch._start = lambda job: (started.append(job.row), start(job))  # type: ignore[assignment, func-returns-value]
        rows = batch.run()
        assert alone.run([bombs[0]], limits, 60.0) == [[Result("syntax", message="compiling it took too long")] * 2]
    assert [{result.status for result in row} for row in rows] == [{"syntax"}, *[{"value"}] * 8, {"syntax"}]
    assert started == [-1, *range(1, 9)]  # the look at all sources has told what is not worth starting


def test_what_is_asked_is_made_when_it_is_sent() -> None:
    programs = [Program("", (Feed("1" * 1000), Check("f()", ("f",)))) for _ in range(20)]
    batch = Batch(lambda: None, 2, programs, Limits(), 1.0)  # type: ignore[arg-type, return-value]
    assert len(batch.waiting) == 40 and not any(job.runs for job in batch.waiting)


def test_programs_go_first_where_memory_is_short(sandbox: Sandbox) -> None:
    sandbox.run([Program("", (Call("1"),))], Limits(), 60.0)
    (server,) = sandbox._servers
    assert Path(f"/proc/{server.process.pid}/oom_score_adj").read_text() == "1000\n"
