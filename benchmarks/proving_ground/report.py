"""Tables and plots of the results that are there, and what is missing of them.

Owns what is shown: `benchmarks/results/algorithms.md` and `.png`, the figure of the README, and the tables of
`docs/evidence.md`, between `<!-- results: NAME -->` and `<!-- end -->`. A number over seeds is a mean; its interval is
Student's at 95%, of the seeds of training on the same test rows.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.proving_ground.plots import plot_details, plot_gains
from benchmarks.proving_ground.results import Group, Result, Results, ordered, pass_of, solved
from benchmarks.proving_ground.settings import (
    ALGORITHMS,
    EVERY_LINE,
    LINES,
    ON_ALL_KINDS,
    QUESTIONS,
    RESULTS,
    ROOT,
    TASKS,
    TRAINED,
    UNMASKING,
    Run,
)
from benchmarks.proving_ground.statistics import pass_at, pass_half, student_half
from benchmarks.proving_ground.unmasking import POLICIES, above_front, front
from rl4dlm.evaluation.intervals import wilson_interval

PAGE = ROOT / "docs" / "evidence.md"
FIGURE = ROOT / "docs" / "images" / "evidence.png"
CHEAPEST = "diffu_grpo"
"""What costs are compared with."""
UNPAID = "lightningrl+no_speed"
"""What a reward of speed is compared with, seed by seed."""
PRICED = ("inexact", "views")
"""Questions whose tables say what runs have fed and taken: it is what they are about."""
SEEDS = 3
"""Fewest that a line of a table is complete with."""
MISSING = "–"
NOTHING = "No run is there yet."
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def report(folder: Path = RESULTS, page: Path = PAGE, figure: Path = FIGURE) -> None:
    """Writes all that is shown."""
    results = Results(folder)
    folder.with_suffix(".md").write_text(everything(results))
    page.write_text(filled(page.read_text(), results))
    if results.runs:
        figure.parent.mkdir(parents=True, exist_ok=True)
        plot_gains(results, figure)
        plot_details(results, folder.with_suffix(".png"))


def everything(results: Results) -> str:
    """All tables, each under its name."""
    titles = {
        **{"/".join(group): _title(group) for group in results.groups()},
        **{f"question/{name}": f"Question: {name.replace('_', ' ')}" for name in QUESTIONS},
    }
    parts = ["# Algorithms on the proving ground", "", table("overview", results)]
    for name, title in titles.items():
        parts += ["", f"## {title}", "", table(name, results)]
    return "\n".join([*parts, "", "Made by `python benchmarks/algorithms.py --report`.", ""])


def filled(text: str, results: Results) -> str:
    """The text with the present tables in the places of those that it has."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{table(found[2], results)}\n\n{found[4]}", text)


def table(name: str, results: Results) -> str:
    """One table: `overview`, `cost`, `speed`, `rates`, `question/NAME`, or `TASK/MODEL/BUDGET`; or the `figure`.

    Raises:
        ValueError: there is no such table.
    """
    if name == "overview":
        return overview(results)
    if name == "cost":
        return cost(results)
    if name == "speed":
        return accuracy_over_speed(results)
    if name == "rates":
        return rates(results)
    if name == "figure":
        return "![Points gained by every algorithm on every task](images/evidence.png)" if results.runs else NOTHING
    kind, _, rest = name.partition("/")
    if name == "question/distillation":
        return by_forwards(results)
    if name == "question/unmasking":
        return beside_fixed(results)
    if kind == "question" and rest in QUESTIONS:
        return answers(rest, results)
    if kind in TASKS and len(name.split("/")) == 3:
        task, model, budget = name.split("/")
        return of_group((task, model, budget), results)
    raise ValueError(f"there is no table {name!r}")


def overview(results: Results) -> str:
    """Points gained at the speed of training, by algorithm, task and model, from as many completions."""
    groups = [group for group in results.groups() if group[2] == "completions"]
    if not groups:
        return NOTHING
    rows = [["start: solved", *(_rate(results.before[group[:2]], str(TRAINED)) for group in groups)]]
    for name in ordered(results, groups):
        rows.append([LINES[name].title, *(interval(results.gains(group, name)) for group in groups)])
    text = markdown(["points gained at 4 tokens per step", *(f"{task}, {model}" for task, model, _ in groups)], rows)
    return "\n\n".join([text, *_notes(results, groups)])


def of_group(group: Group, results: Results) -> str:
    """What every line solves at every speed, how its completions are, and what it took."""
    start = results.before.get(group[:2])
    if start is None or group not in results.runs:
        return NOTHING
    speeds = list(start["measured"]["solved"])
    accuracy = [["start", "", *(_rate(start, speed) for speed in speeds), *_speed([start])]]
    passes = [f"{pass_of(pass_at, k, start):.3f} ± {pass_of(pass_half, k, start):.3f}" for k in (1, 8)]
    nature = [["start", *passes, *_nature([start])[2:], "", "", ""]]
    for name in ordered(results, [group]):
        found = results.runs[group].get(name, [])
        gains = results.gains(group, name)
        spread = f", {min(gains):+.1f} to {max(gains):+.1f}" if len(gains) > 1 else ""
        accuracy.append([LINES[name].title, interval(gains) + spread, *_accuracy(found, speeds)])
        nature.append([LINES[name].title, *_nature(found), *_price(found)])
    first = ["", "points gained at 4, by seed from lowest to highest"]
    first += [s if s != "threshold" else "0.9 sure" for s in speeds] + ["tokens per forward where 0.9 sure", "area"]
    second = ["", "pass@1", "pass@8", "length", "ended", "empty", "drift, nats", *PRICE]
    parts = [markdown(first, accuracy), markdown(second, nature), *_notes(results, [group])]
    return "\n\n".join(parts)


def answers(question: str, results: Results, groups: Sequence[Group] = ()) -> str:
    """What the variations of a question gain, beside the algorithms that they vary; with `groups` in these alone."""
    varied = QUESTIONS[question]
    names = list(dict.fromkeys(n for name, (algorithm, _) in varied.items() for n in (algorithm, name)))
    names.sort(key=lambda name: list(EVERY_LINE).index(name.partition("+")[0]))  # keeps the order within an algorithm
    groups = groups or [group for group in results.groups() if any(name in results.runs[group] for name in varied)]
    if not groups:
        return NOTHING
    if question in PRICED and len(groups) > 1:  # tables that would be too wide beside one another
        return "\n\n".join(answers(question, results, [group]) for group in groups)
    rows, open_ones = [], []
    for name in names:
        title = Run(groups[0][0], groups[0][1], name).title
        if not any(results.runs[group].get(name) for group in groups):
            open_ones.append(title)
            continue
        cells = [title, ", ".join(f"`{k}: {v}`" for k, v in varied[name][1].items()) if name in varied else ""]
        for group in groups:
            at_most = results.gains(group, name, "1")
            cells += [interval(results.gains(group, name)), interval(at_most)]
            if question in PRICED:
                cells += _price(results.runs[group].get(name, ()))
        rows.append(cells)
    measured = (f"at {TRAINED}", "at 1", *(PRICE if question in PRICED else ()))
    alone = len(groups) == 1
    heads = [what if alone else f"{', '.join(group)}: {what}" for group in groups for what in measured]
    where = f" ({', '.join(groups[0])})" if alone else ""
    text = markdown([f"points gained, by tokens per step{where}", "settings", *heads], rows)
    text = "\n\n".join([text, *learned_orders(names, groups, results)])
    return f"{text}\n\nNot run: {', '.join(open_ones)}." if open_ones else text


def learned_orders(names: Sequence[str], groups: Sequence[Group], results: Results) -> list[str]:
    """What models with an unmasking policy solve in its order, beside the confident order and the start, by speed."""
    tables = []
    for group in groups:
        found = {name: results.runs[group][name] for name in names if results.runs[group].get(name)}
        found = {name: runs for name, runs in found.items() if all("learned" in run["measured"] for run in runs)}
        if not found:
            continue
        start = results.before[group[:2]]
        speeds = list(next(iter(found.values()))[0]["measured"]["learned"])
        rows = [["start", "confident", *(_rate(start, speed) for speed in speeds)]]
        for name, runs in found.items():
            for order, where in (("learned", "learned"), ("confident", "solved")):
                cells = [_mean(runs, at("measured", where, speed, "solved"), spread=True) for speed in speeds]
                rows.append([Run(*group[:2], name).title, order, *cells])
        tables.append(markdown([f"{', '.join(group)}: solved at", "order", *speeds], rows))
    return tables


def beside_fixed(results: Results) -> str:
    """Where policies decide: forwards, solved, and points above the best fixed schedule at as many forwards."""
    varied = QUESTIONS["unmasking"]
    parts = []
    for group in results.groups():
        runs = {name: results.runs[group][name] for name in (*UNMASKING, *varied) if results.runs[group].get(name)}
        if not runs:
            continue
        first = next(iter(runs.values()))[0]["points"]["fixed"]
        rows = []
        for name, found in sorted(runs.items(), key=lambda each: list(EVERY_LINE).index(each[0].partition("+")[0])):
            settings = ", ".join(f"`{k}: {v}`" for k, v in varied[name][1].items()) if name in varied else ""
            for label in POLICIES:
                measured = [mean(f["points"]["policy"][label][place] for f in found) for place in (0, 1)]
                above = [above_front(f["points"], label) for f in found]
                known = [value for value in above if value is not None]
                cell = interval(known) if len(known) == len(above) else "faster than any"
                title = f"{Run(*group[:2], name).title}, {label} ({len(found)} seeds)"
                rows.append([title, settings, f"{measured[0]:.2f}", f"{measured[1]:.3f}", cell])
        heads = [", ".join(group[:2]), "settings", "forwards", "solved", "points above fixed schedules"]
        hull = front([(forwards, solved) for forwards, solved in first.values()])
        labels = {tuple(point): label for label, point in first.items()}
        best = ", ".join(f"{labels[point]} {point[1]:.3f} at {point[0]:.2f}" for point in hull)
        parts += [markdown(heads, rows), f"Best fixed schedules: {best} forwards."]
    return "\n\n".join(parts) or NOTHING


def cost(results: Results, group: Group = ("few_clue_sudoku", "full", "completions")) -> str:
    """Positions fed for a completion: by rollouts and fixed policies, by an update, and all, beside diffu-GRPO's."""
    runs = results.runs.get(group, {})
    if not runs.get(CHEAPEST):
        return NOTHING

    def of_update(found: Result) -> float:
        scored: float = found["steps"] * found["scale"]["completions"]
        return found["positions"]["with_gradient"] / scored

    def beside(found: Result) -> float:
        return found["positions"]["without_gradient"] / found["completions"]

    def whole(found: Result) -> float:
        return sum(found["positions"].values()) / found["completions"]

    least = [mean(map(read, runs[CHEAPEST])) for read in (of_update, whole)]
    rows = []
    for name in sorted((n for n in ALGORITHMS if runs.get(n)), key=lambda n: mean(map(of_update, runs[n]))):
        update, other, every = (mean(map(read, runs[name])) for read in (of_update, beside, whole))
        cells = f"{other:.1f}", f"{update:.1f}", f"{update / least[0]:.1f}", f"{every:.1f}", f"{every / least[1]:.2f}"
        rows.append([LINES[name].title, *cells])
    heads = ["positions for a completion", "rollout, old scores", "an update", "times diffu-GRPO's"]
    return markdown([*heads, "all of its run", "times diffu-GRPO's"], rows)


def accuracy_over_speed(results: Results, group: Group = ("few_clue_sudoku", "full", "completions")) -> str:
    """Accuracy and tokens per forward where everything sure enough is written at once, paid for speed or not."""
    start = results.before.get(group[:2])
    names = [name for name in ("lightningrl", *QUESTIONS["speed"], "ebpo", CHEAPEST) if results.runs[group].get(name)]
    if start is None or not names:
        return NOTHING
    unpaid = {found["seed"]: _quick(found) for found in results.runs[group].get(UNPAID, ())}
    first = f"{_quick(start)['tokens_per_forward']:.2f}"
    rows = [["start", "", first, "", _rate(start, "threshold"), "", _rate(start, str(TRAINED))]]
    for name in names:
        found = results.runs[group][name]
        given = {**LINES["lightningrl"].settings, **QUESTIONS["speed"].get(name, ("", {}))[1]}
        paid = name.startswith("lightningrl") and bool(given["reward_weights"][-1])
        pays = ("right answers" if given.get("speed_gate", "correct") == "correct" else "all") if paid else "no"
        pairs = [(_quick(f), unpaid[f["seed"]]) for f in found if f["seed"] in unpaid] if paid else []
        faster, worse = (
            interval([scale * (mine[key] - theirs[key]) for mine, theirs in pairs], form) if pairs else ""
            for key, scale, form in (("tokens_per_forward", 1, ".2f"), ("solved", 100, ".1f"))
        )
        quick = _mean(found, at("measured", "solved", "threshold", "tokens_per_forward"), ".2f", spread=True)
        so, four = (_mean(found, at("measured", "solved", s, "solved"), spread=True) for s in ("threshold", "4"))
        rows.append([f"{Run(*group[:2], name).title} ({len(found)} seeds)", pays, quick, faster, so, worse, four])
    heads = ["", "paid for speed", "tokens per forward", "more than unpaid", "solved so", "points more than unpaid"]
    return markdown([*heads, "solved at 4 per step"], rows)


def by_forwards(results: Results, group: Group = ("few_clue_sudoku", "full", "completions")) -> str:
    """What self-distilled models solve by the forwards of an answer, and where everything sure enough is written."""
    runs = results.runs.get(group, {})
    names = [name for name in QUESTIONS["distillation"] if runs.get(name)]
    start = results.before.get(group[:2])
    if start is None or not names:
        return NOTHING
    canvas, speeds = TASKS[group[0]].canvas, [s for s in start["measured"]["solved"] if s != "threshold"]
    rows = [["start", "", *(_rate(start, s) for s in (*speeds, "threshold")), f"{_quick(start)['forwards']:.2f}"]]
    for name in names:
        found = runs[name]
        settings = ", ".join(f"`{k}: {v}`" for k, v in QUESTIONS["distillation"][name][1].items())
        cells = [_mean(found, at("measured", "solved", s, "solved"), spread=True) for s in (*speeds, "threshold")]
        forwards = _mean(found, at("measured", "solved", "threshold", "forwards"), ".2f", spread=True)
        rows.append([f"{Run(*group[:2], name).title} ({len(found)} seeds)", settings, *cells, forwards])
    heads = [f"solved with {canvas // int(s)} forwards" for s in speeds]
    return markdown([", ".join(group[:2]), "settings", *heads, "0.9 sure", "forwards so"], rows)


def rates(results: Results, group: Group = ("few_clue_sudoku", "full", "completions")) -> str:
    """What every algorithm gains with a third of its learning rate, with its own and with three times that."""
    runs = results.runs.get(group, {})
    names = [name for name in ALGORITHMS if any(runs.get(f"{name}+{w}") for w in ("slow", "fast"))]
    if not names:
        return NOTHING
    rows = []
    for name in names:
        three = (f"{name}+slow", name, f"{name}+fast")
        cells = [interval(results.gains(group, each)) for each in three]
        cells += [interval(results.gains(group, each, "1")) for each in three]
        rows.append([ALGORITHMS[name].title, f"{Run(*group[:2], name).settings()['learning_rate']:g}", *cells])
    heads = [f"{times}, at {speed}" for speed in (TRAINED, 1) for times in ("a third", "its own", "three times")]
    return markdown(["points gained, by learning rate and tokens per step", "its own rate", *heads], rows)


def _quick(found: Result) -> Mapping[str, Any]:
    quick: Mapping[str, Any] = found["measured"]["solved"]["threshold"]
    return quick


# --- cells ------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], form: str = ".1f") -> str:
    """The mean and Student's interval; of a single value no interval, of none the sign for it."""
    if not values:
        return MISSING
    if len(values) == 1:
        return f"{values[0]:+{form}} (one seed)"
    return f"{mean(values):+{form}} ± {student_half(values):{form}}"


def _rate(found: Result, speed: str) -> str:
    rate, rows = solved(speed)(found["measured"]), found["measured"]["rows"]
    low, high = wilson_interval(rate * rows, rows)
    return f"{rate:.3f} [{low:.3f}, {high:.3f}]"


def _mean(found: Sequence[Result], read: Callable[[Result], float], form: str = ".3f", spread: bool = False) -> str:
    """The mean; with `spread` also Student's interval, where there are several."""
    values = [read(result) for result in found]
    if not values:
        return MISSING
    half = f" ± {format(student_half(values), form.lstrip('+'))}" if spread and len(values) > 1 else ""
    return format(mean(values), form) + half


def _accuracy(found: Sequence[Result], speeds: Iterable[str]) -> list[str]:
    return [_mean(found, at("measured", "solved", speed, "solved"), spread=True) for speed in speeds] + _speed(found)


def _speed(found: Sequence[Result]) -> list[str]:
    quick = _mean(found, at("measured", "solved", "threshold", "tokens_per_forward"), ".2f", spread=True)
    return [quick, _mean(found, at("measured", "area"), spread=True)]


def _nature(found: Sequence[Result]) -> list[str]:
    cells = [_mean(found, functools.partial(pass_of, pass_at, k), spread=True) for k in (1, 8)]
    cells.append(_mean(found, at("measured", "drawn", "length"), ".1f"))
    cells += [_mean(found, at("measured", "drawn", name)) for name in ("ended", "empty")]
    return [*cells, _mean(found, at("measured", "drift", 0), "+.2f", spread=True)]


def at(*keys: Any) -> Callable[[Result], float]:
    """What reads an entry of a result."""
    return lambda result: functools.reduce(operator.getitem, keys, result)  # type: ignore[arg-type, return-value]


PRICE = ("completions", "positions fed, M", "CPU s")


def _price(found: Sequence[Result]) -> list[str]:
    fed = _mean(found, lambda r: sum(r["positions"].values()) / 1e6, ".2f")
    return [_mean(found, at("completions"), ".0f"), fed, _mean(found, at("cpu_seconds"), ".0f")]


def _notes(results: Results, groups: Sequence[Group]) -> list[str]:
    """What is missing and what was given up."""
    notes = []
    for group in groups:
        wanted = LINES if group[1] == "full" else ON_ALL_KINDS
        few = {name: len(results.runs[group].get(name, ())) for name in wanted if Run(*group[:2], name).exists}
        for count in range(SEEDS):
            names = [LINES[name].title for name in few if few[name] == count]
            if names:
                which = "all lines" if len(names) == len(few) else ", ".join(names)
                notes.append(f"Missing in {', '.join(group)}: {SEEDS - count} of {SEEDS} seeds of {which}.")
        lost = [r for r in results.given_up if (r["task"], r["model"], r["budget"]) == group]
        notes += [f"Given up in {', '.join(group)}: {r['name']}, seed {r['seed']}: {r['given_up']}" for r in lost]
    return notes


def _title(group: Group) -> str:
    task, model, budget = group
    return f"{task}, {model} attention, as many {budget}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
