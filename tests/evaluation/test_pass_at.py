"""pass@k against what it estimates: the share of all choices of k completions with a right one."""

from __future__ import annotations

import itertools

import pytest

from rl4dlm import DecodingConfig, evaluate
from rl4dlm.evaluation.pass_at import pass_at, solved_by


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_a_problem_counts_by_the_choices_that_solve_it(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert solved_by(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_estimate_is_unbiased() -> None:
    """Over all outcomes of n completions, each right with probability p, its mean is 1 - (1 - p)^k."""
    p, n = 0.3, 5
    for k in range(1, n + 1):
        mean = 0.0
        for outcome in itertools.product([True, False], repeat=n):
            weight = p ** sum(outcome) * (1 - p) ** (n - sum(outcome))
            mean += weight * solved_by(n, sum(outcome), k)
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_problems_are_the_trials_and_what_cannot_be_judged_is_left_out() -> None:
    verdicts = [True, False, False, None, True, True, None, None, None, False, False, False]
    found = pass_at(verdicts, 3, 2)
    # [1 of 3 right], [both judged ones right], [none judged], [none right]
    assert found is not None and found.problems == 3
    assert found.rate == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found.interval[0] < found.rate < found.interval[1]
    assert pass_at([None, None], 2, 1) is None
    assert pass_at([True, None], 2, 2) is None
    with pytest.raises(ValueError, match="pass_at=4 is not allowed; it must be between 1 and num_samples=3"):
        pass_at(verdicts, 3, 4)
    for n, right, k, named in ((3, 1, 4, "k=4"), (3, 1, 0, "k=0"), (3, 4, 1, "right=4")):
        with pytest.raises(ValueError, match=named):
            solved_by(n, right, k)


def test_evaluation_estimates_it(constant_model, tokenizer, letters) -> None:
    model = constant_model({"a": 0.3, "b": 0.7})
    task = letters(["x"] * 60, ["a"] * 60)
    one = DecodingConfig(canvas_length=1, steps=1, temperature=1.0)
    (measured,) = evaluate(
        model, tokenizer, task, decodings={1: one}, num_samples=10, pass_at=(1, 3)
    ).measurements.values()
    assert list(measured.pass_at) == ["1", "3"]
    assert measured.pass_at["1"].rate == pytest.approx(measured.solve_rate)
    # Within five standard errors; a problem's value varies less than a coin.
    wanted = 1 - 0.7**3
    assert measured.pass_at["3"].rate == pytest.approx(wanted, abs=5 * (wanted * (1 - wanted) / 60) ** 0.5)
    with pytest.raises(ValueError, match="pass_at=3 is not allowed; it must be between 1 and num_samples=2"):
        evaluate(model, tokenizer, task, decodings={1: one}, num_samples=2, pass_at=(3,))
