"""Nothing runs below the level asked for: what a machine lacks is said before anything is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl4dlm.grading import pool as settings
from rl4dlm.grading.sandbox import (
    Call,
    Limits,
    Program,
    Result,
    SandboxError,
    active_level,
    levels,
    require_sandbox,
    run_programs,
    strongest_level,
)
from tests.grading.sandbox.conftest import ROOT

ONE = Program("", (Call("1"),))


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Levels put into this set are not offered."""
    missing: set[str] = set()
    monkeypatch.setattr(levels, "why_not", lambda level: "unshare: not permitted" if level in missing else "")
    monkeypatch.setattr(settings, "_configured", {})
    levels._announce.cache_clear()
    return missing


def test_strongest_level_that_there_is(lacking: set[str]) -> None:
    assert strongest_level() == active_level() == "namespaces"
    lacking.add("namespaces")
    assert strongest_level() == active_level() == "landlock"
    lacking.add("landlock")
    assert strongest_level() is None


def test_level_is_said_once(lacking: set[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rl4dlm"):
        assert require_sandbox() == require_sandbox() == "namespaces"
        settings.configure(sandbox_level="landlock")
        assert require_sandbox() == "landlock"
        settings.configure(sandbox_level="strongest")
        assert require_sandbox() == "namespaces"  # never what was asked for before
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["'namespaces'", "'landlock'"]


def test_level_asked_for_or_nothing(lacking: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings.configure(sandbox_level="landlock")
    assert active_level() == "landlock"
    lacking.add("namespaces")
    monkeypatch.setenv("RL4DLM_REWARD_SANDBOX_LEVEL", "namespaces")
    assert active_level() == "landlock"  # what configure says wins
    settings._configured.clear()
    with pytest.raises(SandboxError, match="sandbox_level='namespaces'.*unshare: not permitted.*offers.*'landlock'"):
        require_sandbox()


def test_no_sandbox_is_refused_before_anything_runs(lacking: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lacking.update(("namespaces", "landlock"))
    monkeypatch.setattr(levels, "Sandbox", None)  # nothing may be started
    for refused in (require_sandbox, active_level, lambda: run_programs([ONE])):
        with pytest.raises(SandboxError, match="sandbox_level='strongest'.*namespaces.*landlock.*docs/sandbox.md"):
            refused()


@pytest.mark.parametrize(
    "setting", [{"sandbox_level": "none"}, {"sandbox_level": ""}, {"sandbox_workers": -1}, {"sandbox_workers": 1.5}]
)
def test_wrong_settings_are_named(setting: dict[str, float | str]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}="):
        settings.configure(**setting)


def test_wrong_limits_are_named() -> None:
    for wrong in ({"seconds": 0.0}, {"memory_bytes": -1}, {"threads": 1.5}, {"cpu_seconds": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget=0"):
        run_programs([ONE], budget=0)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_configured", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert levels.share_of_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert levels.share_of_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert levels.share_of_cores() == 1
    settings.configure(sandbox_workers=3)
    assert levels.share_of_cores() == 3


# --- other machines than this one, in a process of their own ----------------------------------------------------------

# Has the kernel refuse system calls of this process and of those that it starts, as the filter of a container does.
_REFUSE = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
lines = [struct.pack("=HBBI", 0x20, 0, 0, 0)]
for number in {numbers}:
    lines += [struct.pack("=HBBI", 0x15, 0, 1, number), struct.pack("=HBBI", 6, 0, 0, 0x50001)]
text = b"".join([*lines, struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)])
held = ctypes.create_string_buffer(text, len(text))
zero = ctypes.c_ulong(0)
assert libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0
header = struct.pack("@HP", len(text) // 8, ctypes.addressof(held))
assert libc.syscall(317, 1, 0, header) == 0
"""
# The superuser becomes an ordinary user, for whom the way to Python is open, as it would be.
_ORDINARY = """
import ctypes, os, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags, options=None):
    assert libc.mount(source, target.encode(), kind, ctypes.c_ulong(flags), options) == 0, ctypes.get_errno()
assert libc.unshare(0x20000) == 0
mount(None, "/", None, 16384 | 1 << 18)
base = os.path.realpath(sys.base_prefix)
first, held = "/" + base.split("/")[1], tempfile.mkdtemp()
if not os.stat(first).st_mode & 1:
    mount(base.encode(), held, None, 4096)
    mount(b"tmpfs", first, b"tmpfs", 0, b"mode=755")
    os.makedirs(base)
    mount(held.encode(), base, None, 4096)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""
_REPORT = """
from rl4dlm.grading.sandbox import Call, Program, SandboxError, levels, run_programs
for level in levels.LEVELS:
    print(level, levels.why_not(level) or "offered")
try:
    parts = (Call("os.getuid() > -1"), Call("open('/etc/passwd')"))
    print(run_programs([Program("import os", parts)])[0])
except SandboxError as error:
    print("refused", error)
"""


def report(before: str, tmp_path: Path) -> list[str]:
    script = "import sys\nsys.path.insert(0, sys.argv[1])\nimport rl4dlm.grading.sandbox.levels\n" + before + _REPORT
    command = [sys.executable, "-c", script, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


on_x86_64 = pytest.mark.skipif(
    not hasattr(os, "uname") or os.uname().machine != "x86_64", reason="numbers of system calls of x86_64"
)


@on_x86_64
def test_machine_without_namespaces_uses_landlock(tmp_path: Path) -> None:
    if levels.why_not("landlock"):
        pytest.skip("this machine has no Landlock either")
    first, second, results = report(_REFUSE.format(numbers=(272, 165)), tmp_path)  # unshare, mount
    assert first.startswith("namespaces ") and "not permitted" in first
    assert second == "landlock offered"
    assert "status='value', value=True" in results and "PermissionError" in results


@on_x86_64
def test_machine_without_either_is_refused(tmp_path: Path) -> None:
    *_, refusal = report(_REFUSE.format(numbers=(272, 165, 444)), tmp_path)
    assert refusal.startswith("refused sandbox_level='strongest'")
    assert "no Landlock" in refusal


def test_ordinary_user_has_the_same_levels(tmp_path: Path) -> None:
    if os.getuid() != 0 or levels.why_not("namespaces"):
        pytest.skip("becoming an ordinary user needs the superuser's rights")
    *offered, results = report(_ORDINARY, tmp_path)
    assert offered == ["namespaces offered", "landlock offered"]
    assert "status='value', value=True" in results and "FileNotFoundError" in results


def test_results_are_counted() -> None:
    if strongest_level() is None:
        pytest.skip("this machine offers no sandbox")
    before = settings.usage()
    hangs = Program("while True: pass", (Call("1"),))
    results = run_programs([ONE, hangs], limits=Limits(seconds=0.3))
    after = settings.usage()
    assert [row[0].status for row in results] == ["value", "timeout"]
    assert (after.items - before.items, after.late - before.late) == (2, 1)
    assert after.seconds > before.seconds
    assert run_programs([]) == []
    assert run_programs([Program("1 / 0", ())]) == [[]]
    assert results[0][0] == Result("value", 1)
