"""Numbers made of numbers: pass@k, and intervals. Owns formulas alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from statistics import stdev

T_95 = (float("inf"), 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 0.975 quantile of Student's t by degrees of freedom: half the length of a 95% interval in standard errors."""


def pass_at(right: Sequence[int], k: int) -> float:
    """pass@k from how many prompts have 0, 1, ..., n right completions.

    Raises:
        ValueError: k is larger than n.
    """
    return sum(prompts * value for prompts, value in zip(right, _solved_by(len(right) - 1, k), strict=True)) / sum(
        right
    )


def pass_half(right: Sequence[int], k: int) -> float:
    """Half the length of the 95% interval of pass@k over prompts, by the normal distribution of a mean."""
    total, mean = sum(right), pass_at(right, k)
    each = zip(right, _solved_by(len(right) - 1, k), strict=True)
    return 1.96 * sqrt(sum(prompts * (value - mean) ** 2 for prompts, value in each)) / total


def student_half(values: Sequence[float]) -> float:
    """Half the length of Student's 95% interval of the mean of at least two values."""
    return T_95[len(values) - 1] * stdev(values) / sqrt(len(values))


def _solved_by(n: int, k: int) -> list[float]:
    """Of a prompt with 0, 1, ..., n right completions, the share of choices of k that has a right one."""
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is not allowed; it must be between 1 and the {n} completions of a prompt")
    return [1 - comb(n - count, k) / comb(n, k) for count in range(n + 1)]
