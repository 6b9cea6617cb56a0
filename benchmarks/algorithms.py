"""Every algorithm on every task and model of the proving ground, from as many completions or as many positions.

A run trains one small model on one task with one algorithm and one seed, in minutes on one thread, and leaves one
file in `benchmarks/results/algorithms/`. One that is there is not made again, so that the grid can be stopped and
started; a file whose settings have changed is left alone and named, unless `--again` is given.

    python benchmarks/algorithms.py                                  every algorithm and control, three seeds
    python benchmarks/algorithms.py --variants negatives views       what a question varies
    python benchmarks/algorithms.py --algorithms bernoulli_unmasking ctrldiff --variants unmasking
                                                                     where a frozen model writes
    python benchmarks/algorithms.py --budget positions               from as many positions fed
    python benchmarks/algorithms.py --report                         tables and plots of what is there

Settings are in `proving_ground/settings.py`, what is measured is said in `proving_ground/measuring.py`, and what was
found in `docs/evidence.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.proving_ground.run import make_all, state_of  # noqa: E402
from benchmarks.proving_ground.settings import EVERY_LINE, LINES, MODELS, QUESTIONS, TASKS, VARIANTS, Run  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes what is missing, in the order of seeds; or the report. Returns 1 where something could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["full"], metavar="MODEL")
    parser.add_argument(
        "--algorithms", nargs="+", choices=EVERY_LINE, metavar="NAME", help="default: all, and controls"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=[*QUESTIONS, *VARIANTS], metavar="NAME", help="questions, or single variations"
    )
    parser.add_argument("--budget", choices=["completions", "positions"], default="completions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--nice", type=int, default=10, help="of these processes: others go first; 0: none does")
    parser.add_argument("--again", action="store_true", help="make what was made with other settings again")
    parser.add_argument("--list", action="store_true", help="print what would be made")
    parser.add_argument("--report", action="store_true", help="tables and plots of what is there")
    options = parser.parse_args(arguments)
    if options.report:
        from benchmarks.proving_ground.report import report

        report()
        return 0
    runs = chosen(options)
    if options.list:
        print("\n".join(f"{run.path().relative_to(ROOT)}: {state_of(run)}" for run in runs))
        return 0
    states = make_all(runs, options.jobs, again=options.again, nice=options.nice)
    counted = {state: list(states.values()).count(state) for state in ("made", "there", "changed")}
    failed = len(states) - sum(counted.values())
    print(f"{counted['made']} made, {counted['there']} there, {failed} failed")
    if counted["changed"]:
        print(f"{counted['changed']} were made with other settings and are left alone; --again makes them anew")
    return 1 if failed or counted["changed"] else 0


def chosen(options: argparse.Namespace) -> list[Run]:
    """The runs of a command: the first seed of everything first."""
    variants = [name for wanted in options.variants or () for name in QUESTIONS.get(wanted, [wanted])]
    algorithms = options.algorithms if options.algorithms or variants else list(LINES)
    runs = [
        Run(task, model, name, options.budget, seed)
        for seed in options.seeds
        for name in [*(algorithms or ()), *variants]
        for task in options.tasks
        for model in options.models
    ]
    return [run for run in runs if run.exists]


if __name__ == "__main__":
    sys.exit(main())
