"""What running a program in the sandbox costs, at each level that this machine offers, and what is left behind.

    python benchmarks/sandbox.py

At each level it runs programs of one part and of three, which do nothing and which compute for about 5 ms; checks
apart from the program; a batch of 512 of which a tenth hang; and 1,000 programs after which processes, files and open
descriptors are counted. Cost is processor time of everything together: the trainer's side, the server, and what it
started. "Per core" is what one core would do at that cost; the rate on the clock also tells what else the machine did.
Writes `benchmarks/results/sandbox.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl4dlm.evaluation import machine, versions
from rl4dlm.grading.sandbox import Call, Check, Feed, Limits, Program, levels
from rl4dlm.grading.sandbox.isolation import LEVELS
from rl4dlm.grading.sandbox.pool import Sandbox

RESULTS = Path(__file__).resolve().parent / "results"
_COMPUTES = (
    "def f(x):\n    total = 0\n    for number in range({loops}):\n        total += number & x\n    return total\n"
)
_HANGS = Program("def f(x):\n    while True: pass\n", (Call("f(1)"),))
_FILE = "written-by-a-program-in-the-sandbox"
_CLAIMS = {"executions_per_core": 100, "cpu_ms": 7.0}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="programs of each kind")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the batch in which a tenth hangs")
    parser.add_argument("--leaks", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python benchmarks/sandbox.py",
        "claims": _CLAIMS,
        "workers": options.workers,
        "load": os.getloadavg(),
        "machine": machine(),
        "versions": versions(),
        "levels": {},
    }
    kinds = _kinds()
    for level in LEVELS:
        reason = levels.why_not(level)
        if reason:
            report["levels"][level] = {"not_offered": reason}
            continue
        with Sandbox(level, options.workers) as sandbox:
            sandbox.run([Program("", (Call("1"),))], Limits(), 60.0)
            report["levels"][level] = {
                "cost": {name: cost(sandbox, program, options.runs) for name, program in kinds.items()},
                "hanging": hanging(sandbox, kinds["nothing, 1 call"], options.batch, options.budget),
                "leaks": leaks(sandbox, list(kinds.values()), options.leaks),
            }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sandbox.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "sandbox.md").write_text(page(report))
    print(page(report))


def cost(sandbox: Sandbox, program: Program, runs: int) -> dict[str, float]:
    """Of one execution: milliseconds of a processor, executions per second of a core and on the clock."""
    before, started = cpu(sandbox), time.perf_counter()
    results = sandbox.run([program] * runs, Limits(seconds=60.0), 600.0)
    seconds, used = time.perf_counter() - started, cpu(sandbox) - before
    assert all(result.status == "value" for row in results for result in row), results[0]
    return {
        "cpu_ms": round(1000 * used / runs, 2),
        "executions_per_core": round(runs / used, 1),
        "executions_per_second": round(runs / seconds, 1),
    }


def hanging(sandbox: Sandbox, program: Program, size: int, budget: float) -> dict[str, Any]:
    """A batch of which a tenth never ends."""
    programs = [_HANGS if row % 10 == 0 else program for row in range(size)]
    started = time.perf_counter()
    results = sandbox.run(programs, Limits(seconds=5.0), budget)
    seconds = time.perf_counter() - started
    statuses = Counter(row[0].status for row in results)
    return {"programs": size, "budget": budget, "seconds": round(seconds, 1), "statuses": dict(statuses)}


def leaks(sandbox: Sandbox, programs: Sequence[Program], size: int) -> dict[str, int]:
    """What there is more of afterwards."""
    (server,) = sandbox._servers
    mixed = [*programs, Program("1 / 0", (Call("1"),)), Program("import os\nos._exit(1)", (Call("1"),))]
    mixed.append(Program(f"open('/tmp/{_FILE}', 'w').write('x')", (Call("1"),)))
    deadline = time.monotonic() + 30
    while left(server.process.pid)["processes"] and time.monotonic() < deadline:
        time.sleep(0.05)  # those of the batch before are still ending
    many = [mixed[row % len(mixed)] for row in range(size)]
    before = left(server.process.pid)
    sandbox.run(many, Limits(seconds=60.0), 3600.0)
    return {"programs": size, **{name: count - before[name] for name, count in left(server.process.pid).items()}}


def left(server: int) -> dict[str, int]:
    """Processes below the server, descriptors of it and of this process, its mounts, and a file that programs write."""
    children = Path(f"/proc/{server}/task/{server}/children")
    return {
        "processes": len(children.read_text().split()) if children.exists() else 0,
        "descriptors": len(os.listdir("/proc/self/fd")) + len(os.listdir(f"/proc/{server}/fd")),
        "mounts": len(Path(f"/proc/{server}/mounts").read_text().splitlines()),
        "files": int(Path("/tmp", _FILE).exists()),
    }


def cpu(sandbox: Sandbox) -> float:
    """Seconds of a processor so far: of this process, the server, and all that it started and reaped."""
    fields = Path(f"/proc/{sandbox._servers[0].process.pid}/stat").read_text().rpartition(")")[2].split()
    mine = os.times()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + mine.user + mine.system


def _kinds() -> dict[str, Program]:
    nothing, loops = "def f(x):\n    return x\n", 1000
    while True:  # as many rounds as take 5 ms here
        names: dict[str, Any] = {}
        exec(compile(_COMPUTES.format(loops=loops), "<benchmark>", "exec"), names)  # noqa: S102  (written above)
        rounds = []
        for _ in range(5):
            started = time.process_time()
            names["f"](3)
            rounds.append(time.process_time() - started)
        if min(rounds) >= 0.005:
            break
        loops = int(loops * 1.2)
    computes = _COMPUTES.format(loops=loops)
    return {
        "nothing, 1 call": Program(nothing, (Call("f(1)"),)),
        "nothing, 3 calls": Program(nothing, tuple(Call(f"f({number})") for number in range(3))),
        "nothing, fed": Program("print(input())", (Feed("1\n"),)),
        "nothing, 1 check apart": Program(nothing, (Check("assert f(1) == 1", ("f",)),)),
        "5 ms, 1 call": Program(computes, (Call("f(3)"),)),
    }


def page(report: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["| level | program | CPU each, ms | executions/s per core | on the clock |", "|---|---|---:|---:|---:|"]
    more = []
    for level, found in report["levels"].items():
        if "not_offered" in found:
            more.append(f"- `{level}` is not offered here: {found['not_offered']}")
            continue
        for name, row in found["cost"].items():
            numbers = " | ".join(str(row[key]) for key in ("cpu_ms", "executions_per_core", "executions_per_second"))
            lines.append(f"| {level} | {name} | {numbers} |")
        hung, after = found["hanging"], found["leaks"]
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(hung["statuses"].items()))
        kinds = ", ".join(f"{after[name]} {name}" for name in ("processes", "descriptors", "mounts", "files"))
        more += [
            f"- `{level}`: {hung['programs']} programs of which a tenth hang ended in {hung['seconds']} s "
            f"(budget {hung['budget']:g} s): {statuses}.",
            f"- `{level}`: {after['programs']} programs left {kinds}.",
        ]
    load = ", ".join(f"{value:.1f}" for value in report["load"])
    return "\n".join(
        [
            "What running a program in the sandbox costs: processor time of the trainer's side, the server and what it "
            "started.",
            "",
            *lines,
            "",
            *more,
            "",
            f"Measured on {report['machine']['cpu']} ({report['machine']['cores']} cores, load {load}, "
            f"{report['workers']} programs at once); `{report['command']}`. Aimed at: "
            f"{report['claims']['executions_per_core']} executions/s per core, {report['claims']['cpu_ms']} ms each.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
