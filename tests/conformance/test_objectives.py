"""Recorded scores, losses and gradients of the families in `losses/`, from recorded masks through their trainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance import losses, report
from tests.conformance.cases import Case, load_cases
from tests.conformance.losses.tools import disturbed

CASES = [case for case in load_cases() if not case.not_covered and case.kind == "objective"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_scores_losses_and_gradients(case: Case, tmp_path: Path):
    verdict = losses.run(case, tmp_path)
    if verdict.equal:
        report.equal[case.family].append(case.name)
    for rule in verdict.rules:
        report.explained[rule].append(case.name)


ONE_OF_EACH = {(case.family, *sorted(case.outputs)): case for case in CASES}.values()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ONE_OF_EACH])
def test_a_wrong_record_is_noticed(case: Case, tmp_path: Path):
    # A few of them, spread over all outputs: each is a run of its own.
    wrong = disturbed(case)
    assert wrong
    for changed, altered in wrong[:: max(1, len(wrong) // 6)]:
        with pytest.raises(AssertionError):
            losses.run(altered, tmp_path)
            pytest.fail(f"{changed} was changed, and nothing noticed", pytrace=False)
