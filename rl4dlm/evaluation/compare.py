"""Two measurements of the same items: the paired difference with an interval, and which items changed.

Owns how items of two results find each other, and the statistics. Files are `results.py`'s.

Where every item is right or wrong, the interval is Newcombe's for paired proportions (Statist. Med. 17, 1998, 2635,
method 10: Wilson's intervals of the two rates, put together with their correlation), and the p-value McNemar's exact
one, of the items that changed. Where items are means over samples the interval is Student's of their differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist, mean, stdev

from rl4dlm.evaluation.intervals import wilson_interval
from rl4dlm.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class Paired:
    """How two measurements differ on the items that both have.

    Args:
        items: items that both have and could judge.
        first, second: mean of the items, of each measurement. difference: second less first.
        interval: of `difference`.
        p_value: McNemar's, exact and two-sided; None where items are means over samples.
        gained, lost: places, among the items of the first result, of those that got better and worse.
        method: of the interval.
    """

    items: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_value: float | None
    gained: list[int]
    lost: list[int]
    method: str


def paired(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, places: Sequence[int] | None = None
) -> Paired:
    """The difference of two measurements of the same items, each between 0 and 1.

    Args:
        confidence: nominal coverage of the interval.
        places: what items are called in `gained` and `lost`; None: 0, 1, 2, ….

    Raises:
        ValueError: nothing to compare, or a confidence that is none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} items cannot be compared; both need the same, and at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not allowed; it must be between 0 and 1")
    places = range(len(first)) if places is None else places
    pairs = list(zip(first, second, strict=True))
    gained = [place for place, (a, b) in zip(places, pairs, strict=True) if b > a]
    lost = [place for place, (a, b) in zip(places, pairs, strict=True) if b < a]
    p_value: float | None = None
    if all(value in (0, 1) for pair in pairs for value in pair):
        method = "Newcombe, paired proportions"
        both = sum(1 for a, b in pairs if a and b)
        interval = newcombe_interval(
            both, len(lost), len(gained), len(pairs) - both - len(lost) - len(gained), confidence
        )
        p_value = mcnemar(len(gained), len(lost))
    else:
        if len(pairs) < 2:
            raise ValueError("1 item with several samples has no interval; compare more items")
        method = "Student, paired means"
        differences = [b - a for a, b in pairs]
        half = student_quantile((1 + confidence) / 2, len(pairs) - 1) * stdev(differences) / sqrt(len(pairs))
        interval = mean(differences) - half, mean(differences) + half
    means = mean(first), mean(second)
    return Paired(len(pairs), *means, means[1] - means[0], interval, p_value, gained, lost, method)


def compare(
    first: EvaluationResult, second: EvaluationResult, labels: tuple[str, str], confidence: float = 0.95
) -> Paired:
    """The paired difference of one measurement of each of two results, over the items that both have.

    Items are the same if their columns are; where both results have the same prompt style, their prompts must be, too.

    Raises:
        ValueError: a label that a result does not have, or no item in common.
    """
    values = []
    for result, label in zip((first, second), labels, strict=True):
        if label not in result.measurements:
            raise ValueError(f"{result.task} has no decoding {label!r}; it has {', '.join(result.measurements)}")
        values.append(result.measurements[label].item_values())
    with_prompts = first.style == second.style
    places = [result.item_keys(with_prompts) for result in (first, second)]
    shared = [
        (i, values[0][i], values[1][places[1][key]])
        for key, i in places[0].items()
        if key in places[1] and i < len(values[0]) and places[1][key] < len(values[1])
    ]
    judged = [(i, a, b) for i, a, b in shared if a is not None and b is not None]
    if not judged:
        raise ValueError(
            f"the two results of {first.task}, {first.split} split, have no item in common that both could judge"
        )
    return paired([a for _, a, _ in judged], [b for _, _, b in judged], confidence, [i for i, _, _ in judged])


def newcombe_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval of the difference of two paired rates, second less first; see above."""
    n = both + only_first + only_second + neither
    rates = (both + only_second) / n, (both + only_first) / n
    ends = [wilson_interval(rate * n, n, confidence) for rate in rates]
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    excess: float = both * neither - only_first * only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)  # his correction for continuity
    phi = excess / sqrt(product) if product else 0.0
    (low, high), (other_low, other_high) = ends
    below, above = rates[0] - low, high - rates[0]
    other_below, other_above = rates[1] - other_low, other_high - rates[1]
    difference = rates[0] - rates[1]
    down = sqrt(max(below**2 - 2 * phi * below * other_above + other_above**2, 0.0))
    up = sqrt(max(above**2 - 2 * phi * above * other_below + other_below**2, 0.0))
    return difference - down, difference + up


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value that gains and losses are equally likely."""
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n)


def student_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t, at a share above one half; exact for 1 and 2 degrees of freedom.

    Else by bisection of the distribution, whose tail is summed as a finite series for whole degrees of freedom.
    """
    low, high = 0.0, 2.0
    while _student_share(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _student_share(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, by the finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    from math import atan, cos, pi, sin

    if freedom > 1000:
        return NormalDist().cdf(t)
    angle = atan(t / sqrt(freedom))
    cosine = cos(angle)
    term = total = cosine if freedom % 2 else 1.0
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if freedom == 1:
        inside = 2 * angle / pi
    elif freedom % 2:
        inside = 2 / pi * (angle + sin(angle) * total)
    else:
        inside = sin(angle) * total
    return (1 + inside) / 2
