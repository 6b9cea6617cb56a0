"""Accuracy at several speeds as one number: the area under it, and AUP. Owns formulas.

Speed is tokens per forward, which does not depend on the machine. With points (speed, solve rate) by rising speed:

- the **area over speed** is the mean solve rate over the logarithm of the speed, by trapezoids: each doubling of the
  speed counts the same. Of one point it is its solve rate.
- **AUP**, accuracy under parallelism, is d3LLM's (arXiv 2601.07568): with speeds r_1 < ... < r_m and accuracies y_i in
  per cent,

      AUP = r_1 y_1 + sum_{i >= 2} (r_i - r_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2,
      W(y) = min(exp(-3 (1 - y / y_best)), 1),

  over the points with y_i >= y_1 - 5, where y_best is the best accuracy that anything reached on the task. A method
  that is fast and wrong gains little.

d3LLM's script refuses to compute where the fastest point lies more than 5 below the first one; here such points are
left out, as its text says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isfinite, log

ALPHA, TOLERANCE = 3.0, 5.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Speed:
    """What accuracy at several speeds comes to.

    Args:
        area: mean solve rate over the logarithm of tokens per forward, 0 to 1.
        aup: of d3LLM, in per cent times tokens per forward.
        best: the solve rate that `aup` takes for the best one on the task, 0 to 1.
        points: tokens per forward and solve rate, by rising speed.
    """

    area: float
    aup: float
    best: float
    points: list[tuple[float, float]]

    @classmethod
    def of(cls, points: Points, best: float | None = None) -> Speed:
        """From points in any order. `best`: see `aup`.

        Raises:
            ValueError: no points, or numbers that are no speeds and rates.
        """
        ordered = _ordered(points)
        top = max(rate for _, rate in ordered) if best is None else best
        return cls(area(ordered), aup(ordered, top), top, ordered)


def area(points: Points) -> float:
    """The area over speed of points (tokens per forward, solve rate), between 0 and 1; see above.

    Raises:
        ValueError: no points, or numbers that are no speeds and rates.
    """
    ordered = _ordered(points)
    width = log(ordered[-1][0] / ordered[0][0])
    if not width:
        return sum(rate for _, rate in ordered) / len(ordered)
    return sum(log(b / a) * (left + right) / 2 for (a, left), (b, right) in pairwise(ordered)) / width


def aup(points: Points, best: float | None = None) -> float:
    """d3LLM's AUP of points (tokens per forward, solve rate from 0 to 1), in per cent times tokens per forward.

    Args:
        best: the best solve rate on the task, of all methods that are compared. None: the best of these points.

    Raises:
        ValueError: no points, or numbers that are no speeds and rates.
    """
    ordered = _ordered(points)
    best = max(rate for _, rate in ordered) if best is None else best
    if not 0 <= best <= 1:
        raise ValueError(f"best={best} is not allowed; it must be a solve rate, between 0 and 1")
    kept = [(speed, rate) for speed, rate in ordered if 100 * rate >= 100 * ordered[0][1] - TOLERANCE - 1e-9]

    def weighted(rate: float) -> float:
        return 100 * rate * min(exp(-ALPHA * (1 - rate / best)), 1.0) if best else 0.0

    first = kept[0][0] * 100 * kept[0][1]
    return first + sum((b - a) * (weighted(left) + weighted(right)) / 2 for (a, left), (b, right) in pairwise(kept))


def _ordered(points: Points) -> list[tuple[float, float]]:
    if not points:
        raise ValueError("points is empty; give at least one speed and its solve rate")
    for speed, rate in points:
        if not (speed > 0 and isfinite(speed) and 0 <= rate <= 1):
            raise ValueError(f"({speed}, {rate}) is not allowed; a point is a speed above 0 and a rate between 0 and 1")
    return sorted((float(speed), float(rate)) for speed, rate in points)
