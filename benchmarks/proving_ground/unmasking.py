"""Policies that decide where to write beside the best fixed schedules, at equal forwards.

Owns what is measured of them: points (forwards of a completion, share of test rows solved) of the policy, greedy and
drawn, and of fixed schedules of the same frozen model, from one token per step to eight and confidence thresholds; and
how far a point lies above the front of the fixed ones. The front is their upper concave hull: on a straight line
between two schedules lies what one gets who decodes some prompts with one and some with the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.proving_ground.settings import SPEEDS, UNMASKING, Run

THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
POLICIES = {"greedy": 0.0, "drawn": 1.0}
"""How a trained policy decides: `policy_temperature` by label."""

Point = tuple[float, float]  # forwards, solved


def decides(run: Run) -> bool:
    """Whether a run trains a policy beside a frozen model."""
    return run.algorithm in UNMASKING


def policy_decoding(run: Run, policy: Any, temperature: float = 0.0) -> Any:
    """Tokens at temperature 0, where the policy says; without it, those that it is trained with."""
    from rl4dlm import DecodingConfig

    settings = run.settings()
    arguments = {**(settings.get("schedule_args") or {}), "policy": policy, "policy_temperature": temperature}
    return DecodingConfig(
        canvas_length=run.ground.canvas,
        block_length=settings["block_length"],
        schedule=UNMASKING[run.algorithm].settings["schedule"],
        schedule_args=arguments,
    )


def fixed_decodings(run: Run) -> dict[str, Any]:
    """The fixed schedules, by label, in the blocks of the task."""
    from rl4dlm import DecodingConfig

    canvas, block = run.ground.canvas, run.ground.block
    found = {
        f"{speed} per step": DecodingConfig(canvas_length=canvas, steps=canvas // speed, block_length=block)
        for speed in SPEEDS
        if speed <= block
    }
    for threshold in THRESHOLDS:
        found[f"{threshold} sure"] = DecodingConfig(
            canvas_length=canvas, block_length=block, schedule="threshold", schedule_args={"threshold": threshold}
        )
    return found


def points(run: Run, model: Any, tokenizer: Any) -> dict[str, dict[str, list[float]]]:
    """Forwards and share solved on the test split: `policy` and `fixed`, each by label."""
    from rl4dlm import load_task
    from rl4dlm.evaluation import evaluate

    policy = model.unmasking_policy
    decodings = {
        "policy": {label: policy_decoding(run, policy, value) for label, value in POLICIES.items()},
        "fixed": fixed_decodings(run),
    }
    task = load_task(run.task, **run.ground.arguments)
    found = {}
    for kind, each in decodings.items():
        result = evaluate(model, tokenizer, task, decodings=each, split="test", limit=run.scale.test)
        found[kind] = {label: [round(m.nfe, 3), m.solve_rate] for label, m in result.measurements.items()}
    return found


def front(fixed: Sequence[Point]) -> list[Point]:
    """The upper concave hull of points, from the fewest forwards to the highest share solved."""
    hull: list[Point] = []
    for point in sorted(fixed, key=lambda each: (each[0], -each[1])):
        if hull and point[1] <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def best_fixed(fixed: Sequence[Point], forwards: float) -> float | None:
    """The share solved on the front at so many forwards; None below the fewest of any fixed schedule."""
    hull = front(fixed)
    if not hull or forwards < hull[0][0]:
        return None
    for left, right in pairwise(hull):
        if forwards <= right[0]:
            return left[1] + _slope(left, right) * (forwards - left[0])
    return hull[-1][1]


def above_front(measured: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> float | None:
    """Points that a policy solves more than the best fixed schedule at equal forwards."""
    forwards, solved = measured["policy"][label]
    best = best_fixed([(f, s) for f, s in measured["fixed"].values()], forwards)
    return None if best is None else 100 * (solved - best)


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / max(right[0] - left[0], 1e-9)
