"""The confidence interval of a rate. Owns one formula."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a binomial rate (Wilson 1927), without continuity correction.

    Args:
        successes: between 0 and `trials`; a fraction where each trial is itself a mean.
        trials: number of independent trials, at least 1.
        confidence: nominal coverage, between 0 and 1.

    Returns:
        Lower and upper end, both within [0, 1].

    Raises:
        ValueError: a number outside its range.
    """
    if trials < 1:
        raise ValueError(f"trials={trials} is not allowed; it must be 1 or larger")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} is not allowed; it must be between 0 and trials={trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not allowed; it must be between 0 and 1")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = successes / trials
    center = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # At a rate of 0 or 1 the end at that side is exact; only rounding moves it.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == trials else center + half)
