"""A goodness-of-fit test for draws that are the same in every run."""

from __future__ import annotations

from torch import Tensor


def chi_square(counts: Tensor, probabilities: Tensor) -> None:
    """Asserts that counts follow probabilities, at five standard deviations (Wilson and Hilferty's approximation)."""
    assert bool((counts[probabilities == 0] == 0).all())
    counts, probabilities = counts[probabilities > 0].double(), probabilities[probabilities > 0].double()
    expected = probabilities / probabilities.sum() * counts.sum()
    assert bool((expected >= 5).all()), "too few draws for the test to mean anything"
    degrees = len(expected) - 1
    if degrees:
        statistic, variance = ((counts - expected) ** 2 / expected).sum().item(), 2 / (9 * degrees)
        assert statistic < degrees * (1 - variance + 5 * variance**0.5) ** 3, (statistic, degrees)
