"""Plots of the results that are there: the README's figure, and details of each task.

Owns what is drawn; results and what is read of them are `results.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.proving_ground.results import Result, Results, ordered, pass_of, solved
from benchmarks.proving_ground.settings import ALGORITHMS, LINES, TRAINED
from benchmarks.proving_ground.statistics import pass_at, student_half


def plot_gains(results: Results, path: Path) -> None:
    """Points gained at the speed of training by every line, with full attention: a panel for each task that most
    lines have run on."""
    groups = [
        group
        for group in results.groups()
        if group[1:] == ("full", "completions") and 2 * sum(name in LINES for name in results.runs[group]) > len(LINES)
    ] or results.groups()[:1]
    names = [name for name in reversed(ordered(results, groups)) if any(results.runs[g].get(name) for g in groups)]
    figure, [panels] = _figure(len(groups), height=1.2 + 0.26 * len(names))
    for axes, group in zip(panels, groups, strict=True):
        for place, name in enumerate(names):
            gains = results.gains(group, name)
            if not gains:
                axes.text(0, place, " not run", va="center", fontsize="x-small", color="0.5")
                continue
            color = "tab:blue" if name in ALGORITHMS else "0.5"
            axes.barh(place, mean(gains), color=color, alpha=0.45)
            axes.plot(gains, [place] * len(gains), "o", color=color, markersize=3)
            if len(gains) > 1:
                axes.errorbar(mean(gains), place, xerr=student_half(gains), color="0.2", capsize=2, linewidth=0.8)
        low, high = (f([0.0, *(v for n in names for v in results.gains(group, n))]) for f in (min, max))
        axes.set_xlim(low - 0.15 * (high - low) - 1, high + 0.15 * (high - low) + 1)
        axes.axvline(0, color="0.3", linewidth=0.8)
        start = 100 * solved(str(TRAINED))(results.before[group[:2]]["measured"])
        axes.set_title(f"{group[0]} (from {start:.0f}%)", fontsize="medium")
        axes.set_xlabel("points gained at 4 tokens per step")
    panels[0].set_yticks(range(len(names)), [LINES[name].title for name in names])
    _save(figure, path)


def plot_details(results: Results, path: Path) -> None:
    """By task, on the full-attention model: accuracy over speed, learning curves, and how different completions are."""
    groups = [group for group in results.groups() if group[1:] == ("full", "completions")] or results.groups()[:1]
    figure, panels = _figure(3, rows=len(groups), height=3.4 * len(groups), share=False)
    for row, group in zip(panels, groups, strict=True):
        start = results.before[group[:2]]["measured"]
        speeds = [speed for speed in start["solved"] if speed != "threshold"]
        row[0].plot(range(len(speeds)), [solved(s)(start) for s in speeds], "k--", label="start")
        row[2].plot(*_passes(results.before[group[:2]]), "kx", label="start")
        for place, name in enumerate(LINES):
            found = results.runs[group].get(name, [])
            if not found:
                continue
            look = {"color": f"C{place % 10}", "linestyle": ("-", ":")[place >= 10], "label": LINES[name].title}
            row[0].plot(range(len(speeds)), [mean(results.values(group, name, solved(s))) for s in speeds], **look)
            points = [mean(values) for values in zip(*(r["learning_curve"]["solved"] for r in found), strict=False)]
            used = [0.0, *found[0]["learning_curve"]["used"][: len(points)]]
            row[1].plot(used, [results.before[group[:2]]["validation"], *points], **look)
            each = [mean(values) for values in zip(*map(_passes, found), strict=True)]
            row[2].plot(*each, "o" if place < 10 else "^", color=look["color"])
        row[0].set_xticks(range(len(speeds)), speeds)
        row[0].set(xlabel="tokens per step", ylabel=f"{group[0]}: test rows solved")
        row[1].set(xlabel="share of the budget", ylabel="validation rows solved at 4 tokens per step")
        row[2].set(xlabel="pass@1", ylabel="pass@8, both at temperature 1")
        row[1].legend(fontsize=5)
    _save(figure, path)


def _passes(result: Result) -> tuple[float, float]:
    return pass_of(pass_at, 1, result), pass_of(pass_at, 8, result)


def _figure(columns: int, rows: int = 1, height: float = 4.0, share: bool = True) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.2 * columns + 1.0, height)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", sharey=share, squeeze=False)
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    from matplotlib import pyplot

    pyplot.close(figure)
