"""Recorded scores, losses and gradients of the families in `losses/`, from recorded masks through their trainers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance import losses, report
from tests.conformance.cases import Case, load_cases
from tests.conformance.losses.ebpo import GRID, by_its_grid
from tests.conformance.losses.tools import disturbed
from tests.conformance.losses.tracerl import MASKS

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


@pytest.mark.parametrize("kind", ["k1", "abs"])
def test_divergences_that_are_refused_are_computed_as_recorded(kind: str, tmp_path: Path):
    """Of EBPO's port; no case here has one, so that a recorded one gets a reference and the loss that follows."""
    case = next((case for case in CASES if case.name == "ebpo_loss_b8_global"), None)
    if case is None:
        pytest.skip("no conformance cases")
    bounds = case.outputs["elbo"]
    reference = [bound - (-1) ** i * 0.25 * (i + 1) for i, bound in enumerate(bounds)]
    apart = [a - b for a, b in zip(bounds, reference, strict=True)]
    term = sum(abs(d) if kind == "abs" else d for d in apart) / len(apart)
    made = replace(
        case,
        settings={**case.settings, "kl_loss_coef": 0.5, "kl_loss_type": kind},
        inputs={**case.inputs, "ref_elbo": reference},
        outputs={"elbo": bounds, "loss": case.outputs["loss"] + 0.5 * term},
    )
    assert losses.run(made, tmp_path).rules
    with pytest.raises(AssertionError):
        losses.run(replace(made, outputs={**made.outputs, "loss": case.outputs["loss"]}), tmp_path)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.family == "ebpo"])
def test_the_ports_own_blocks_give_what_is_recorded_on_any_grid(case: Case):
    """The rule for prompts that end in a block holds where they end on the grid as well, and so is no rule there."""
    assert by_its_grid(case).rules == {GRID}
    wrong = [(name, altered) for name, altered in disturbed(case) if "first8" not in name]  # less than norms allow
    for changed, altered in wrong[:: max(1, len(wrong) // 4)]:
        with pytest.raises(AssertionError):
            by_its_grid(altered)
            pytest.fail(f"{changed} was changed, and nothing noticed", pytrace=False)


def test_masks_that_score_a_token_several_times_follow_from_forwards(tmp_path: Path):
    """As those of `tracerl_block_coupled_b4`, which score it once, would if they were such masks."""
    case = next((case for case in CASES if case.name == "tracerl_block_coupled_b4"), None)
    if case is None:
        pytest.skip("no conformance cases")
    made = replace(case, settings={**case.settings, "method": "random"})
    assert losses.run(made, tmp_path).rules == {MASKS}
    with pytest.raises(AssertionError):
        losses.run(replace(made, outputs={**made.outputs, "loss": made.outputs["loss"] + 0.01}), tmp_path)
