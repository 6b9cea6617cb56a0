"""Deadlines hold, batches end, and nothing is left behind, whatever ends first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.grading.sandbox import Call, Check, Limits, Program, Result, batch
from rl4dlm.grading.sandbox.pool import Sandbox
from tests.grading.sandbox.conftest import ROOT, descendants, is_running

FINE = Program("def f(x): return x + 1", (Call("f(1)"),))
HANGS = Program("import time\ndef f(x): time.sleep(3600)", (Call("f(1)"),))
IGNORES = Program("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass", (Call("1"),))


def handles() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def test_batch_in_which_a_tenth_hangs(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_HURRY", 0.2)
    order: list[int] = []
    monkeypatch.setattr(batch.Batch, "_start", _noting(order, batch.Batch._start))
    programs = [HANGS if row % 10 == 3 else FINE for row in range(40)]
    results = sandbox.run(programs, Limits(seconds=0.5), 60.0)
    statuses = [[result.status for result in row] for row in results]
    assert statuses == [["timeout"] if program is HANGS else ["value"] for program in programs]
    hanging = [row for row, program in enumerate(programs) if program is HANGS]
    # Each had its first turn in its place, and its whole time when all others had had theirs.
    assert order[: len(programs)] == list(range(len(programs))) and set(hanging) <= set(order[len(programs) :])


def _noting(order: list[int], start: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def noted(self: batch.Batch, job: Any) -> None:
        if not job.rows:
            order.append(job.row)
        start(self, job)

    return noted


def test_what_did_not_run_says_so(sandbox: Sandbox) -> None:
    results = sandbox.run([IGNORES] * 4, Limits(seconds=30.0), 0.5)
    assert {row[0].status for row in results} <= {"budget", "timeout"}
    assert sandbox.run([FINE], Limits(), 60.0) == [[Result("value", 2)]]
    (server,) = sandbox._servers
    deadline = time.monotonic() + 20
    while descendants(server.process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert descendants(server.process.pid) == set()


def test_time_runs_out_for_a_program_as_for_a_part(sandbox: Sandbox) -> None:
    slow = Program("import time\ndef f(x): time.sleep(x)", tuple(Call("f(60)") for _ in range(5)))
    started = time.monotonic()
    (results,) = sandbox.run([slow], Limits(seconds=0.3, timeouts=2), 60.0)
    assert {result.status for result in results} == {"timeout"}
    assert results[-1].message == "parts before it took the time"
    assert time.monotonic() - started < 30


def count_leaks(sandbox: Sandbox, programs: int) -> None:
    mixed = [FINE, Program("1 / 0", (Call("1"),)), Program("import os\nos._exit(1)", (Call("1"),))]
    mixed += [Program("def f(x): return x", (Check("assert f(1) == 1", ("f",)),))]
    sandbox.run(mixed, Limits(), 60.0)
    (server,) = sandbox._servers
    inside = Path(f"/proc/{server.process.pid}/fd")
    files = set(os.listdir("/tmp"))
    before, of_server = handles(), sorted(os.listdir(inside))
    results = sandbox.run(mixed * (programs // 4), Limits(seconds=30.0), 600.0)
    assert len(results) == programs // 4 * 4
    assert [row[0].status for row in results[:4]] == ["value", "error", "ended", "value"]
    assert handles() == before and sorted(os.listdir(inside)) == of_server
    assert descendants(server.process.pid) == set()
    left = set(os.listdir("/tmp")) - files
    assert not [name for name in left if "rl4dlm" in name or "sandbox" in name]


def test_nothing_is_left_behind(sandbox: Sandbox) -> None:
    count_leaks(sandbox, 40)


@pytest.mark.slow
def test_thousand_programs_leave_nothing_behind(sandbox: Sandbox) -> None:
    count_leaks(sandbox, 1000)


def test_no_process_before_first_use_and_none_after_close(sandbox: Sandbox) -> None:
    own = Sandbox(sandbox.level, 1)
    assert own._servers == []
    own.run([FINE], Limits(), 60.0)
    (server,) = own._servers
    pid = server.process.pid
    own.close()
    assert not is_running(pid)
    assert own.run([FINE], Limits(), 60.0) == [[Result("value", 2)]]
    own.close()


def test_server_that_is_killed_is_replaced(sandbox: Sandbox) -> None:
    with Sandbox(sandbox.level, 2) as own:
        own.run([FINE], Limits(), 60.0)
        own._servers[0].process.kill()
        own._servers[0].process.wait()
        assert own.run([FINE], Limits(), 60.0) == [[Result("value", 2)]]
        waits = Program("import time\ndef f():\n    time.sleep(1)\n    return 3", (Call("f()"),))
        timer = threading.Timer(0.4, own._servers[0].process.kill)
        timer.start()  # while both of them run
        assert own.run([waits, waits], Limits(seconds=30.0), 60.0) == [[Result("value", 3)]] * 2
        timer.join()


def test_works_off_the_main_thread_and_from_several_at_once(sandbox: Sandbox) -> None:
    found: dict[int, list[list[Result]]] = {}

    def use(thread: int) -> None:
        found[thread] = sandbox.run([Program("", (Call(str(thread)),))] * 3, Limits(seconds=30.0), 60.0)

    threads = [threading.Thread(target=use, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {thread: [[Result("value", thread)]] * 3 for thread in range(4)}


def _in_child(sandbox: Sandbox, say: multiprocessing.connection.Connection) -> None:
    say.send(sandbox.run([FINE], Limits(seconds=30.0), 60.0))
    say.close()
    sandbox.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_has_a_server_of_its_own(sandbox: Sandbox) -> None:
    sandbox.run([FINE], Limits(), 60.0)
    (server,) = sandbox._servers
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(sandbox, theirs))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == [[Result("value", 2)]]
    child.join(60)
    assert sandbox._servers == [server] and is_running(server.process.pid)
    assert sandbox.run([FINE], Limits(), 60.0) == [[Result("value", 2)]]


_TRAINER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
sys.path.insert(0, sys.argv[1])
from rl4dlm.grading.sandbox import Call, Check, Limits, Program
from rl4dlm.grading.sandbox.pool import Sandbox
sandbox = Sandbox(sys.argv[2], 3)
sandbox._server()
print(sandbox._servers[0].process.pid, flush=True)
hangs = "import signal\\nfor n in range(1, 32):\\n    try: signal.signal(n, signal.SIG_IGN)\\n"
hangs += "    except OSError: pass\\ndef f(x):\\n    while True: pass\\n"
parts = (Call("f(1)"), Check("f(2)", ("f",)))
sandbox.run([Program(hangs, parts)] * 3, Limits(seconds=600.0, program_seconds=600.0), 900.0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_end_of_the_trainer_leaves_no_process(sandbox: Sandbox, number: signal.Signals) -> None:
    command = [sys.executable, "-c", _TRAINER, str(ROOT), sandbox.level]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert trainer.stdout is not None
    server = int(trainer.stdout.readline())
    started: set[int] = set()
    deadline = time.monotonic() + 60
    while len(started) < 6 and time.monotonic() < deadline:
        started |= descendants(server)
        time.sleep(0.02)
    assert len(started) >= 6  # three keepers, and what they run
    started |= descendants(server) | {server}
    trainer.send_signal(number)
    trainer.wait(60)
    trainer.stdout.close()
    deadline = time.monotonic() + 60
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in started if is_running(pid)]


def test_what_the_machine_lost_has_another_turn_before_the_others(sandbox: Sandbox) -> None:
    batch_ = batch.Batch(lambda: sandbox._server(), 1, [FINE] * 3, Limits(), 60.0)

    def lose(job: Any) -> None:
        job.runs = batch_._runs(job)
        job.runs[0].status = -1  # its keeper could not be forked
        batch_._settle(job)

    lose(batch_.waiting.popleft())
    assert [(waiting.row, waiting.again) for waiting in batch_.waiting] == [(0, True), (1, False), (2, False)]
    lose(batch_.waiting.popleft())
    assert [waiting.row for waiting in batch_.waiting] == [1, 2]
    assert batch_.results[0][0] is not None and batch_.results[0][0].status == "lost"
