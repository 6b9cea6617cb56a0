"""pass@k: how often one of k completions is right, from n drawn ones.

Owns the estimator and its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from rl4dlm.evaluation.intervals import wilson_interval


@dataclass(frozen=True)
class PassAt:
    """pass@k of one decoding setting.

    Args:
        rate: mean over problems of the share of choices of k completions in which one is right.
        interval: Wilson interval of `rate` at 95 %, with problems as the trials. The values of problems vary less than
            those of a coin with this rate, so it is on the safe side.
        problems: those with at least k completions that could be judged.
    """

    rate: float
    interval: tuple[float, float]
    problems: int


def solved_by(n: int, right: int, k: int) -> float:
    """The share of choices of k out of n completions that have one of the `right` ones: 1 - C(n - right, k) / C(n, k).

    It estimates pass@k without bias (Chen et al., arXiv 2107.03374, equation 1).

    Raises:
        ValueError: a number outside its range.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is not allowed; it must be between 1 and the {n} completions of a problem")
    if not 0 <= right <= n:
        raise ValueError(f"right={right} is not allowed; it must be between 0 and the {n} completions of a problem")
    return 1 - comb(n - right, k) / comb(n, k)


def pass_at(verdicts: Sequence[bool | None], samples: int, k: int) -> PassAt | None:
    """pass@k from verdicts, `samples` for each problem after the other; None where no problem has k that are judged.

    A completion that cannot be judged is left out; a problem with fewer than k others, too.

    Raises:
        ValueError: k is not between 1 and `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at={k} is not allowed; it must be between 1 and num_samples={samples}")
    values = []
    for start in range(0, len(verdicts), samples):
        judged = [verdict for verdict in verdicts[start : start + samples] if verdict is not None]
        if len(judged) >= k:
            values.append(solved_by(len(judged), sum(judged), k))
    if not values:
        return None
    rate = min(1.0, sum(values) / len(values))
    return PassAt(rate, wilson_interval(rate * len(values), len(values)), len(values))
