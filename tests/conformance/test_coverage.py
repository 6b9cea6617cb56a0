"""Every case is run or named as not covered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.cases import KINDS, NOT_COVERED, OBJECTIVES, case_files, load_cases

CASES = load_cases()
TESTS = {
    "logits": "test_logits.py",
    "counts": "test_samplers.py",
    "rewards": "test_rewards.py",
    "loss": "test_losses.py",
    "logps": "test_log_probs.py",
    "sampler": "test_samplers.py",
    "objective": "test_objectives.py",
}


@pytest.mark.skipif(not CASES, reason="no conformance cases")
def test_every_case_is_run_or_listed():
    assert len(CASES) == len(case_files()), "a file in the folder of cases has no outputs"
    unknown = [case.name for case in CASES if case.not_covered == "an unknown family"]
    assert not unknown, f"list their families as covered or not covered: {unknown}"
    lost = [case.name for case in CASES if not case.not_covered and case.kind not in KINDS]
    assert not lost


def test_every_kind_of_case_has_its_test():
    assert set(TESTS) == set(KINDS)
    for file in [*TESTS.values(), *(f"losses/{family}.py" for family in OBJECTIVES)]:
        assert (Path(__file__).parent / file).is_file()


def test_a_family_is_not_both():
    from tests.conformance.cases import COVERED

    assert not set(COVERED) & set(NOT_COVERED)
