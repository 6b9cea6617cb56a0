"""A function applied to hostile items: deadlines hold, an item harms no other, and no process is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rl4dlm.grading import pool as pools
from rl4dlm.grading.pool import configure, current_settings, usage
from rl4dlm.grading.sandbox import levels, pool as servers
from rl4dlm.grading.workers import Outcome, WorkerPool

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the pool is for POSIX systems")

_HANGS = 3600.0  # seconds: an item that is not killed outlasts the test's own time limit


def _pids(pool: WorkerPool) -> list[int]:
    return [server.process.pid for sandbox in pool._sandboxes.values() for server in sandbox._servers]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_order_and_errors_stay_with_their_item() -> None:
    with WorkerPool("math:sqrt") as pool:
        outcomes = pool.map([4, -1, 9, "x", 16], deadline=60)
    assert [outcome.value for outcome in outcomes] == [2, None, 3, None, 4]
    assert outcomes[1].error == "ValueError: math domain error"
    assert outcomes[3].error is not None and outcomes[3].error.startswith("TypeError")


def test_item_that_hangs_is_ended_and_the_next_items_are_served() -> None:
    with WorkerPool("time:sleep", workers=1) as pool:
        assert pool.map([0], deadline=60) == [Outcome(None)]
        assert pool.map([_HANGS, 0], deadline=0.5) == [Outcome(None, "deadline"), Outcome(None)]
        assert pool.map([0, 0], deadline=60) == [Outcome(None)] * 2


def test_slow_item_has_its_whole_time_once_the_others_are_done() -> None:
    with WorkerPool("time:sleep", workers=1) as pool:
        assert pool.map([1.5, 0], deadline=60) == [Outcome(None)] * 2


def test_item_that_ends_its_process_is_an_error_of_that_item_alone() -> None:
    with WorkerPool("os:_exit", workers=2) as pool:
        errors = [outcome.error for outcome in pool.map([3, 4], deadline=60)]
    assert errors == [f"the process ended with status {status} without an answer" for status in (3, 4)]


def test_server_killed_between_two_batches_is_replaced() -> None:
    with WorkerPool("math:sqrt", workers=1) as pool:
        pool.map([1], deadline=60)
        (pid,) = _pids(pool)
        os.kill(pid, 9)
        assert pool.map([4], deadline=60) == [Outcome(2.0)]


def test_equal_items_are_asked_once_and_counted_each() -> None:
    before = usage().items
    with WorkerPool("os:urandom") as pool:
        first, second, third = pool.map([8, 8, 9], deadline=60)
    assert first == second != third
    assert usage().items - before == 3


def test_works_off_the_main_thread_and_from_several_at_once() -> None:
    results: dict[int, list[Outcome]] = {}
    with WorkerPool("math:sqrt") as pool:

        def use(thread: int) -> None:
            results[thread] = pool.map([thread**2] * 5, deadline=60)

        threads = [threading.Thread(target=use, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {thread: [Outcome(float(thread))] * 5 for thread in range(4)}


def test_no_process_before_first_use_and_none_after_close() -> None:
    pool = WorkerPool("math:sqrt", workers=2)
    assert _pids(pool) == []
    pool.map([1, 2, 3], deadline=60)
    pids = _pids(pool)
    assert len(pids) == 1
    pool.close()
    # A zombie, killed but not reaped, would still answer to its id.
    assert not any(map(_is_running, pids))


def test_workers_end_with_the_interpreter() -> None:
    program = (
        "from rl4dlm.grading.workers import WorkerPool\n"
        "pool = WorkerPool('math:sqrt')\n"
        "pool.map([1, 2], deadline=60)\n"
        "print(*(server.process.pid for sandbox in pool._sandboxes.values() for server in sandbox._servers))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids and not any(map(_is_running, pids))


def test_forked_process_gets_workers_of_its_own() -> None:
    with WorkerPool("math:sqrt", workers=1) as pool:
        pool.map([1], deadline=60)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if pool.map([9], deadline=60) == [Outcome(3.0)] else 1
                pool.close()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert pool.map([16], deadline=60) == [Outcome(4.0)]


def test_output_of_the_function_does_not_reach_the_protocol() -> None:
    with WorkerPool("builtins:print") as pool:
        assert pool.map(['{"value": 7}', "x"], deadline=60) == [Outcome(None)] * 2


def test_items_larger_than_a_pipe() -> None:
    with WorkerPool("builtins:len") as pool:
        assert pool.map(["x" * 1_000_000], deadline=60) == [Outcome(1_000_000)]


def test_memory_is_limited() -> None:
    with WorkerPool("builtins:bytearray", memory_gib=0.5) as pool:
        (outcome,) = pool.map([2**31], deadline=60)
    assert outcome.error is not None and outcome.error.startswith("MemoryError")


@pytest.mark.parametrize("function", ["math:no_such_name", "no_such_module_at_all:f"])
def test_function_that_cannot_be_imported_is_an_error_of_the_call(function: str) -> None:
    with WorkerPool(function) as pool, pytest.raises(RuntimeError, match="could not be imported: "):
        pool.map([1], deadline=60)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="function="):
        WorkerPool("sqrt")
    with pytest.raises(ValueError, match="workers="):
        WorkerPool("math:sqrt", workers=0)
    for deadline in (0, -1, float("inf"), float("nan")):
        with WorkerPool("math:sqrt") as pool, pytest.raises(ValueError, match="deadline="):
            pool.map([1], deadline=deadline)


def test_nothing_to_do() -> None:
    with WorkerPool("math:sqrt") as pool:
        assert pool.map([], deadline=60) == []


def test_a9_a_batch_of_hanging_answers_ends_within_its_budget_and_is_remembered() -> None:
    before = usage()
    with WorkerPool("time:sleep", workers=2) as pool:
        pool.map([0, 0], deadline=60)
        started = time.monotonic()
        outcomes = pool.map([_HANGS + i for i in range(64)], deadline=0.2, budget=1.5)
        assert time.monotonic() - started < 4
        assert {outcome.error for outcome in outcomes} == {"deadline", "budget"}
        started = time.monotonic()
        assert pool.map([_HANGS] * 20, deadline=0.2) == [Outcome(None, "deadline")] * 20
        assert time.monotonic() - started < 0.2
    assert usage().late - before.late == 84 and usage().items - before.items == 86


def _replace_boot(monkeypatch: pytest.MonkeyPatch, path: Path, first: str, times: int = 2) -> None:
    """The server's program, but each of the first starts does `first`."""
    boot = (
        "import pathlib, time, os\n"
        f"tries = pathlib.Path({str(path)!r})\n"
        "tries.write_text((tries.read_text() if tries.exists() else '') + 'x')\n"
        f"if len(tries.read_text()) <= {times}:\n    {first}\n"
    )
    monkeypatch.setattr(servers, "_BOOT", boot + servers._BOOT)


@pytest.mark.parametrize("first", ["time.sleep(3600)", "os.kill(os.getpid(), 9)"])
def test_a9_a_start_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    levels.level_for_own()
    with WorkerPool("math:sqrt", workers=1, startup_seconds=3) as pool:
        _replace_boot(monkeypatch, tmp_path / "tries", first)
        assert pool.map([4, 9], deadline=60) == [Outcome(2.0), Outcome(3.0)]


def test_a9_servers_that_never_start_leave_answers_ungraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels.level_for_own()
    with WorkerPool("math:sqrt") as pool:
        _replace_boot(monkeypatch, tmp_path / "tries", "os._exit(1)", times=1000)
        with pytest.warns(RuntimeWarning, match="2 answers are not graded"):
            outcomes = pool.map([4, 9], deadline=60)
    assert all(outcome.lost and outcome.error and "no server could be started" in outcome.error for outcome in outcomes)
    assert len((tmp_path / "tries").read_text()) == 6  # three at the machine's level, and three with limits alone


def test_a9_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_configured", {})
    monkeypatch.setenv("RL4DLM_REWARD_WORKERS", "5")
    monkeypatch.setenv("RL4DLM_REWARD_DEADLINE", "1.5")
    assert current_settings()[:2] == (5, 1.5) and WorkerPool("math:sqrt").workers == 5
    configure(workers=3)
    assert current_settings().workers == 3
    for bad in ({"worker": 1}, {"workers": 0}, {"budget": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            configure(**bad)
    monkeypatch.setenv("RL4DLM_REWARD_DEADLINE", "soon")
    with pytest.raises(ValueError, match="RL4DLM_REWARD_DEADLINE='soon'"):
        current_settings()


# --- at each level that this machine offers, and where there is none --------------------------------------------------


@pytest.fixture(params=["namespaces", "landlock", "limits"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "limits" and levels.why_not(request.param):
        pytest.skip(f"this machine does not offer the level {request.param}")
    monkeypatch.setattr(levels, "why_not", lambda level: "" if level == request.param else "not permitted")
    levels.announce_own.cache_clear()
    return str(request.param)


def test_level_is_said(level: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rl4dlm"):
        assert levels.level_for_own() == levels.level_for_own() == level
    (record,) = caplog.records
    assert (record.levelname, "limits" in record.getMessage()) == (
        ("WARNING", True) if level == "limits" else ("INFO", False)
    )


def test_a10_processes_do_not_see_the_environment(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with WorkerPool("os:getenv") as pool:
        assert pool.map(["HF_TOKEN", "WANDB_API_KEY", "HOME"], deadline=60) == [Outcome(None)] * 3
    assert list(pool._sandboxes) == [level]


def test_what_an_item_can_do_where_the_function_is_led_astray(level: str, tmp_path: Path) -> None:
    target = tmp_path / "written"
    fork = "(lambda pid: pid or __import__('time').sleep(3600))(__import__('os').fork())"
    with WorkerPool("builtins:eval", workers=1) as pool:
        items = [f"open({str(target)!r}, 'w').write('x' * (1 << 25))", fork, "1 + 1"]
        written, forked, fine = pool.map(items, deadline=60)
    assert fine == Outcome(2)
    assert written.value is None and (level == "limits" or not target.exists())
    if level != "limits" or forked.value is None:
        assert forked.error is not None and ("PermissionError" in forked.error or "BlockingIOError" in forked.error)
        return
    status = Path(f"/proc/{forked.value}/status")  # the superuser may fork, and what it has forked is ended, too
    end = time.monotonic() + 5
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_hostile_items_at_every_level(level: str) -> None:
    with WorkerPool("time:sleep", workers=2) as pool:
        outcomes = pool.map([_HANGS, 0, "x", 0.1], deadline=0.5)
    assert [outcome.error and outcome.error[:9] for outcome in outcomes] == ["deadline", None, "TypeError", None]


def test_function_that_must_be_sealed_is_refused_where_nothing_seals_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "why_not", lambda level: "not permitted")
    with WorkerPool("math:sqrt", sealed=True) as pool:
        for refused in (pool.require, lambda: pool.map([4], deadline=60)):
            with pytest.raises(RuntimeError, match="sandbox_level='strongest'.*not permitted"):
                refused()


_NOTHING_NEW = """
import os, sys
del os.pidfd_open, os.memfd_create
"""


def test_system_without_handles_of_processes_and_files_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "why_not", lambda level: "not permitted")
    monkeypatch.setattr(servers, "_BOOT", _NOTHING_NEW + servers._BOOT)
    with WorkerPool("time:sleep", workers=2) as pool:
        outcomes = pool.map([_HANGS, 0, "x", 0.1], deadline=0.5)
        (server,) = _pids(pool)
        assert pool.map([0.2] * 3, deadline=60) == [Outcome(None)] * 3
    assert [outcome.error and outcome.error[:9] for outcome in outcomes] == ["deadline", None, "TypeError", None]
    assert not _is_running(server)


def test_a9_math_reward_logs_time_and_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl4dlm import load_reward

    logged: dict[str, float] = {}
    monkeypatch.setattr(pools, "_configured", {"deadline": 3.0})
    reward = load_reward("math")
    answers = [r"\boxed{9^{9^{9^9}}}", r"\boxed{4}"]
    scores = reward(prompts=["", ""], completions=answers, answer=["3", "4"], log_metric=logged.__setitem__)
    assert scores[1] > scores[0]
    assert logged["reward/deadline_rate"] == 0.5 and logged["reward/seconds"] > 0
