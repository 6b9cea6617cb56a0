"""The worker pool keeps deadlines, survives what its items do, works from any thread, and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rl4dlm.grading.pool import Outcome, WorkerPool

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
