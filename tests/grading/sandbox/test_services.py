"""Programs run by services: what they say becomes the same results, and where they fail nothing is scored."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from rl4dlm.grading import load_reward, pool
from rl4dlm.grading.code.problem import Problem
from rl4dlm.grading.code.verdicts import judge
from rl4dlm.grading.sandbox import fusion
from rl4dlm.grading.sandbox.backends import require_backend, run_programs
from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Call, Check, Feed, Part, Program, Result
from tests.grading.code.dishonest import DISHONEST
from tests.grading.code.honest import HONEST

SQUARE = "def f(x):\n    print('noise')\n    return {'x': (x * x,)}"
LIMITS = Limits(seconds=20.0)


def run_here(code: str, stdin: str | None, seconds: float) -> dict[str, Any]:
    """What SandboxFusion's server answers. Only programs of this file and harmless ones of the tables come here."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], input=stdin or "", capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"status": "Failed", "message": "", "run_result": {"status": "TimeLimitExceeded", "return_code": None}}
    run = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    return {"status": "Failed" if done.returncode else "Success", "message": "", "run_result": run}


class Service(ThreadingHTTPServer):
    """A service at a port of this machine. `answers` are given, in order, instead of running anything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.answers: list[tuple[int, Any]] = []
        self.delay = 0.0


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, **request})
        time.sleep(self.server.delay)
        if self.server.answers:
            status, answer = self.server.answers.pop(0)
        else:
            status, answer = 200, run_here(request["code"], request.get("stdin"), request["run_timeout"])
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with contextlib.suppress(OSError):  # whoever asked has gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(fusion, "_PAUSE", 0.0)
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(pool, "_configured", {"sandbox_backend": "fusion", "sandbox_url": url})
        yield server
        server.shutdown()
        thread.join()


def results_of(source: str, *parts: Part, setup: str = "") -> list[Result]:
    ((*results,),) = run_programs([Program(source, parts, setup)], limits=LIMITS, budget=60.0)
    return results


def test_values_come_back_as_data(service: Service) -> None:
    parts = Call("f(3)"), Call("g(2)"), Call("f"), Call("f('a')"), Check("assert f(2)['x'] == (4,)", ("f",))
    found = results_of(SQUARE, *parts, Check("assert f(2) is None", ("f",)), setup="import math\ng = math.sqrt")
    assert found[0] == Result("value", {"x": (9,)})
    assert found[1] == Result("value", 2**0.5)
    assert found[2].status == "data"
    assert found[3].status == "error" and found[3].message.startswith("TypeError: ")
    assert found[4] == Result("value", True, inside=True)
    assert found[5].status == "wrong" and found[5].inside
    assert {request["path"] for request in service.asked} == {"/run_code"}
    assert {request["language"] for request in service.asked} == {"python"}


def test_a_script_has_its_input_and_what_it_prints(service: Service) -> None:
    assert results_of("print(int(input()) + 1)", Feed("4\n")) == [Result("value", "5\n")]
    (failed,) = results_of("print(1)\nraise ValueError('no')", Feed(""))
    assert failed.status == "error" and failed.message == "ValueError: no"
    assert service.asked[0]["stdin"] == "4\n"


def test_a_program_that_ends_early_or_prints_an_answer_has_none(service: Service) -> None:
    early = "import os, sys\nprint('__PASS_RATE__ 1.0')\nsys.stdout.flush()\nos._exit(0)"
    assert [result.status for result in results_of(early, Call("1"))] == ["ended"]
    long = "import time\ndef f():\n    time.sleep(100)"
    ((result,),) = run_programs([Program(long, (Call("f()"),))], limits=Limits(seconds=1.0), budget=60.0)
    assert result.status == "timeout"


FAILURES: list[tuple[str, list[tuple[int, Any]]]] = [
    ("server errors", [(500, {}), (502, {}), (503, {})]),
    ("too many requests", [(429, {})] * 3),
    ("no JSON", [(200, b"<html>")] * 3),
    ("no object", [(200, [1])] * 3),
    ("not found", [(404, {})]),
    ("its own failure", [(200, {"status": "SandboxError", "message": "no memory"})]),
    ("no result", [(200, {"status": "Success", "message": ""})]),
    ("its runner failed", [(200, {"status": "Failed", "run_result": {"status": "Error", "stderr": "?"}})]),
]


@pytest.mark.parametrize(("name", "answers"), FAILURES)
def test_where_a_service_fails_nothing_is_scored(service: Service, name: str, answers: list[tuple[int, Any]]) -> None:
    service.answers = list(answers)
    logged: dict[str, float] = {}
    problem = Problem(({"call": "f(3)", "expected": "9"},)).to_json()
    text = "def f(x):\n    return x * x"
    assert load_reward("code")(["?"], [text], problem=[problem], log_metric=logged.__setitem__) == [None]
    assert logged["reward/lost_rate"] == 1.0
    assert len(service.asked) == len(answers)


def test_a_service_that_recovers_is_asked_again(service: Service) -> None:
    service.answers = [(503, {}), (429, {})]
    assert results_of("x = 1", Call("x")) == [Result("value", 1)]


def test_a_service_that_does_not_answer_in_time_or_at_all(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_GRACE", 0.1)
    service.delay = 1.0
    ((late,),) = run_programs([Program("x = 1", (Call("x"),))], limits=Limits(seconds=0.2), budget=60.0)
    assert late.status == "lost" and "did not answer in 0.3 seconds" in late.message
    assert len(service.asked) == 1  # it has enough to do
    pool.configure(sandbox_url="http://127.0.0.1:9")
    (nobody,) = results_of("x = 1", Call("x"))
    assert nobody.status == "lost" and "cannot be reached" in nobody.message
    with pytest.raises(RuntimeError, match="no programs can be run: http://127.0.0.1:9/run_code cannot be reached"):
        require_backend()


def test_a_batch_whose_time_is_over_asks_no_more(service: Service) -> None:
    service.delay = 0.3
    pool.configure(sandbox_workers=1)
    programs = [Program(f"x = {n}", (Call("x"),)) for n in range(5)]
    found = [result.status for (result,) in run_programs(programs, limits=LIMITS, budget=0.2)]
    assert found == ["value"] + ["budget"] * 4


def test_the_settings_are_checked_before_training(service: Service) -> None:
    require_backend()
    service.answers = [(200, {"status": "Success", "run_result": {"status": "Finished", "stdout": "41"}})]
    with pytest.raises(RuntimeError, match="answers, but"):
        require_backend()
    for url in ("", "localhost:8080", "ftp://there"):
        pool.configure(sandbox_url=url)
        with pytest.raises(ValueError, match="needs the address of the service"):
            require_backend()


_EARN_HONEST = (
    "plain",
    "prints",
    "floats",
    "sets",
    "class",
    "global_state",
    "exceptions_raised",
    "unicode",
    "in_place",
)
_EARN_NOTHING = ("exits_with_0", "equal_to_everything", "prints_passed", "patched_builtins", "no_function")


def test_honest_and_dishonest_programs_at_a_service(service: Service) -> None:
    pool.configure(sandbox_workers=4)
    problem = Problem(({"call": "f(3)", "expected": "10"}, {"source": "assert f(7) == 50"}), entry_point="f")
    problems = [problem] * len(_EARN_NOTHING)
    programs = [DISHONEST[name] for name in _EARN_NOTHING]
    for name in _EARN_HONEST:
        program, tests = HONEST[name]
        programs.append(program)
        as_tests = ({"source": t} if isinstance(t, str) else {"call": t[0], "expected": t[1]} for t in tests)
        problems.append(Problem(tuple(as_tests)))
    shares = [verdict.passed for verdict in judge([""] * len(programs), problems, programs=programs) if verdict]
    assert shares == [0.0] * len(_EARN_NOTHING) + [1.0] * len(_EARN_HONEST)


# --- E2B --------------------------------------------------------------------------------------------------------------


class CommandExit(Exception):
    """As e2b's `CommandExitException`, which has the fields of a result."""

    def __init__(self, exit_code: int, stdout: str, stderr: str) -> None:
        self.exit_code, self.stdout, self.stderr = exit_code, stdout, stderr


class FakeSandbox:
    """As `e2b_code_interpreter.Sandbox`, but it runs here."""

    made: ClassVar[list[FakeSandbox]] = []
    fails = ""

    def __init__(self) -> None:
        self.written: dict[str, str] = {}
        self.killed = False
        self.files = SimpleNamespace(write=self.written.__setitem__)
        self.commands = SimpleNamespace(run=self.run)
        self.made.append(self)

    @classmethod
    def create(cls, *, timeout: int) -> FakeSandbox:
        if cls.fails == "create":
            raise RuntimeError("rate limit")
        return cls()

    def run(self, command: str, *, timeout: float) -> SimpleNamespace:
        if self.fails == "run":
            raise TimeoutError("no answer")
        code, stdin = self.written["/tmp/program.py"], self.written["/tmp/stdin"]
        assert command.endswith("python3 /tmp/program.py < /tmp/stdin")
        run = run_here(code, stdin, 20.0)["run_result"]
        if run["return_code"]:
            raise CommandExit(run["return_code"], run["stdout"], run["stderr"])
        return SimpleNamespace(exit_code=0, stdout=run["stdout"], stderr=run["stderr"])

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def e2b(monkeypatch: pytest.MonkeyPatch) -> type[FakeSandbox]:
    package = ModuleType("e2b_code_interpreter")
    package.Sandbox = FakeSandbox  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "e2b_code_interpreter", package)
    monkeypatch.setattr(pool, "_configured", {"sandbox_backend": "e2b"})
    monkeypatch.setattr(FakeSandbox, "made", [])
    monkeypatch.setattr(FakeSandbox, "fails", "")
    return FakeSandbox


def test_e2b(e2b: type[FakeSandbox]) -> None:
    require_backend()
    assert results_of(SQUARE, Call("f(3)"), Call("f(None)"))[0] == Result("value", {"x": (9,)})
    (printed,) = results_of("print(int(input()) + 1)", Feed("4\n"))
    assert printed == Result("value", "5\n")
    (failed,) = results_of("raise ValueError('no')", Feed(""))
    assert failed.status == "error" and failed.message == "ValueError: no"
    assert len(e2b.made) == 5 and all(sandbox.killed for sandbox in e2b.made)  # each part has its own


@pytest.mark.parametrize("fails", ["create", "run"])
def test_where_e2b_fails_nothing_is_scored(e2b: type[FakeSandbox], monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setattr(FakeSandbox, "fails", fails)
    (result,) = results_of("x = 1", Call("x"))
    assert result.status == "lost"
    assert all(sandbox.killed for sandbox in e2b.made)
    with pytest.raises(RuntimeError, match="no programs can be run: E2B"):
        require_backend()


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_configured", {"sandbox_backend": "e2b"})
    monkeypatch.setitem(sys.modules, "e2b_code_interpreter", None)
    with pytest.raises(ImportError, match=r"sandbox_backend='e2b' needs e2b_code_interpreter.*rl4dlm\[e2b\]"):
        require_backend()
