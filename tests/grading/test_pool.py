"""The worker pool keeps deadlines, survives what its items do, works from any thread, and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rl4dlm.grading import pool as pools
from rl4dlm.grading.pool import Outcome, WorkerPool, configure, current_settings, usage

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the pool is for POSIX systems")

_HANGS = 3600.0  # seconds: an item that is not killed outlasts the test's own time limit


def _pids(pool: WorkerPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


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


def test_hung_worker_is_killed_and_the_next_items_are_served() -> None:
    with WorkerPool("time:sleep", workers=1) as pool:
        assert pool.map([0], deadline=60) == [Outcome(None)]
        (hung,) = _pids(pool)
        assert pool.map([_HANGS, 0], deadline=0.5) == [Outcome(None, "deadline"), Outcome(None)]
        assert not _is_running(hung)
        assert pool.map([0, 0], deadline=60) == [Outcome(None)] * 2


def test_item_that_ends_its_worker_is_an_error_of_that_item_alone() -> None:
    with WorkerPool("os:_exit", workers=2) as pool:
        errors = [outcome.error for outcome in pool.map([3, 4], deadline=60)]
    assert errors == ["the worker ended with status 3", "the worker ended with status 4"]


def test_worker_killed_between_two_batches_is_replaced() -> None:
    with WorkerPool("math:sqrt", workers=1) as pool:
        pool.map([1], deadline=60)
        pool._workers[0].process.kill()
        pool._workers[0].process.wait()
        assert pool.map([4], deadline=60) == [Outcome(2.0)]


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
    assert 1 <= len(pids) <= 2
    pool.close()
    # A zombie, killed but not reaped, would still answer to its id.
    assert not any(map(_is_running, pids))


def test_workers_end_with_the_interpreter() -> None:
    program = (
        "from rl4dlm.grading.pool import WorkerPool\n"
        "pool = WorkerPool('math:sqrt')\n"
        "pool.map([1, 2], deadline=60)\n"
        "print(*(worker.process.pid for worker in pool._workers))\n"
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
    with WorkerPool(function) as pool, pytest.raises(RuntimeError, match="could not start: "):
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


def _replace_program(pool: WorkerPool, path: Path, first: str) -> None:
    """The worker program, but each of the first two starts does `first`."""
    path.write_text(
        "import pathlib, runpy, sys, time, os\n"
        f"tries = pathlib.Path({str(path.with_suffix('.tries'))!r})\n"
        "tries.write_text((tries.read_text() if tries.exists() else '') + 'x')\n"
        f"if len(tries.read_text()) <= 2:\n    {first}\n"
        f"runpy.run_path({pool._command[2]!r}, run_name='__main__')\n"
    )
    pool._command[2] = str(path)


@pytest.mark.parametrize("first", ["time.sleep(3600)", "os.kill(os.getpid(), 9)", "print('garbage', flush=True)"])
def test_a9_a_start_that_fails_is_tried_again(tmp_path: Path, first: str) -> None:
    with WorkerPool("math:sqrt", workers=1, startup_seconds=5) as pool:
        _replace_program(pool, tmp_path / "program.py", first)
        assert pool.map([4, 9], deadline=60) == [Outcome(2.0), Outcome(3.0)]


def test_a9_workers_that_never_start_leave_answers_ungraded() -> None:
    with WorkerPool("math:sqrt") as pool:
        pool._command[:] = ["/bin/false"]
        with pytest.warns(RuntimeWarning, match="2 answers are not graded"):
            outcomes = pool.map([4, 9], deadline=60)
    assert all(outcome.error and "no worker could be started" in outcome.error for outcome in outcomes)


def test_a9_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_configured", {})
    monkeypatch.setenv("RL4DLM_REWARD_WORKERS", "5")
    monkeypatch.setenv("RL4DLM_REWARD_DEADLINE", "1.5")
    assert current_settings()[:2] == (5, 1.5) and WorkerPool("math:sqrt")._limit == 5
    configure(workers=3)
    assert current_settings().workers == 3
    for bad in ({"worker": 1}, {"workers": 0}, {"budget": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            configure(**bad)
    monkeypatch.setenv("RL4DLM_REWARD_DEADLINE", "soon")
    with pytest.raises(ValueError, match="RL4DLM_REWARD_DEADLINE='soon'"):
        current_settings()


def test_a10_workers_do_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with WorkerPool("os:getenv") as pool:
        assert pool.map(["HF_TOKEN", "WANDB_API_KEY"], deadline=60) == [Outcome(None)] * 2


def test_a10_limits_and_forked_children(tmp_path: Path) -> None:
    target = tmp_path / "written"
    with WorkerPool("builtins:eval", workers=1) as pool:
        (written,) = pool.map([f"open({str(target)!r}, 'w').write('x' * 100000)"], deadline=60)
        assert written.error is not None and "OSError" in written.error
        fork = "(lambda pid: pid or __import__('time').sleep(3600))(__import__('os').fork())"
        (forked,) = pool.map([fork], deadline=60)
    if forked.value is None:  # not even allowed to
        assert forked.error is not None and "BlockingIOError" in forked.error
        return
    status = Path(f"/proc/{forked.value}/status")
    end = time.monotonic() + 5
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a9_math_reward_logs_time_and_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl4dlm import load_reward

    logged: dict[str, float] = {}
    monkeypatch.setattr(pools, "_configured", {"deadline": 3.0})
    reward = load_reward("math")
    answers = [r"\boxed{9^{9^{9^9}}}", r"\boxed{4}"]
    scores = reward(prompts=["", ""], completions=answers, answer=["3", "4"], log_metric=logged.__setitem__)
    assert scores[1] > scores[0]
    assert logged["reward/deadline_rate"] == 0.5 and logged["reward/seconds"] > 0
