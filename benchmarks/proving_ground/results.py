"""The results that are there, and what tables and plots read of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.proving_ground.settings import LINES, MODELS, RESULTS, TASKS, TRAINED

Result = Mapping[str, Any]
Group = tuple[str, str, str]  # task, model, budget


class Results:
    """What is there: by task, model and budget the runs of each line or variation, in the order of seeds."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.before: dict[tuple[str, str], Result] = {}
        self.runs: dict[Group, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        self.given_up: list[Result] = []
        for path in sorted(folder.glob("*/*/*.json")):
            found = json.loads(path.read_text())
            if found["name"] == "before":
                self.before[found["task"], found["model"]] = found
            elif "given_up" in found:
                self.given_up.append(found)
            else:
                self.runs[found["task"], found["model"], found["budget"]][found["name"]].append(found)

    def groups(self) -> list[Group]:
        """In the order of the settings."""
        order = {name: place for place, name in enumerate([*TASKS, *MODELS, "completions", "positions"])}
        return sorted(self.runs, key=lambda group: [order[name] for name in group])

    def values(self, group: Group, name: str, read: Callable[[Result], float]) -> list[float]:
        return [read(found["measured"]) for found in self.runs[group].get(name, ())]

    def gains(self, group: Group, name: str, speed: str = str(TRAINED)) -> list[float]:
        """Points gained on the same test rows, by seed."""
        start = solved(speed)(self.before[group[:2]]["measured"])
        return [100 * (value - start) for value in self.values(group, name, solved(speed))]


def solved(speed: str) -> Callable[[Result], float]:
    return lambda measured: measured["solved"][speed]["solved"]


def pass_of(of: Callable[[Sequence[int], int], float], k: int, result: Result) -> float:
    """pass@k, or its interval; of all completions where there are fewer."""
    right = result["measured"]["drawn"]["right"]
    return of(right, min(k, len(right) - 1))


def ordered(results: Results, groups: Sequence[Group]) -> list[str]:
    """Lines by their mean gain, the highest first; those without a run last."""

    def gain(name: str) -> float:
        gains = [mean(results.gains(group, name)) for group in groups if results.runs[group].get(name)]
        return mean(gains) if gains else float("-inf")

    return sorted(LINES, key=gain, reverse=True)
