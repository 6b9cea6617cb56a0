"""Recorded samplers: equal ids, states and forwards, or exactly the difference that stated rules predict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance import report
from tests.conformance.cases import Case, folder, load_cases
from tests.conformance.literals import FAMILIES, family_of, record
from tests.conformance.samplers import Recorded, Run
from tests.conformance.verdict import difference, verdict

CASES = load_cases()
MADE_UP = sorted({module.__name__: module for module in FAMILIES.values() if hasattr(module, "made_up")}.items())


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in CASES if not case.not_covered and case.kind == kind]


@pytest.mark.parametrize("case", of_kind("sampler"))
def test_sampler(case: Case):
    rules = verdict(record(case))
    if not rules:
        report.equal[case.family].append(case.name)
    for rule in rules:
        report.explained[rule].append(case.name)


@pytest.mark.parametrize("case", of_kind("counts"))
def test_counts(case: Case):
    family_of(case).check_counts(case)
    report.equal[case.family].append(case.name)


@pytest.mark.parametrize("case", list({case.values[0].family: case for case in of_kind("sampler")}.values()))
def test_a_wrong_record_is_noticed(case: Case):
    recorded = record(case)
    ids = recorded.ids.clone()
    ids[0, recorded.prompts.shape[1]] = (ids[0, recorded.prompts.shape[1]] + 1) % 8
    with pytest.raises(AssertionError):
        verdict(dataclasses.replace(recorded, ids=ids))
    with pytest.raises(AssertionError):
        verdict(dataclasses.replace(recorded, nfe=recorded.nfe + 1))
    with pytest.raises(AssertionError):
        verdict(dataclasses.replace(recorded, forwards=recorded.forwards[::-1]))


def test_a_count_that_is_not_the_length_of_its_own_list_is_a_difference():
    """A run that goes on after the record's last state would agree with a count that is one too high."""
    ids, open_row = torch.tensor([[5, 7]]), torch.tensor([5, 63])
    case = Case(Path("made_up.json"), "klass_made_up", {}, {}, {}, {}, {})
    recorded = Recorded(case, ids[:, :1], torch.ones(1, 1).bool(), ids, [open_row[None]], 2)
    ours = Run(ids, [[open_row, ids[0]]], [2])
    assert "counts 2 forwards and lists 1" in difference(recorded, ours)
    assert not difference(dataclasses.replace(recorded, nfe=1), Run(ids, [[open_row]], [1]))


@pytest.mark.skipif(not folder().is_dir(), reason="no conformance cases")
@pytest.mark.parametrize("module", [pytest.param(module, id=name.split(".")[-1]) for name, module in MADE_UP])
@pytest.mark.parametrize("seed", range(8))
def test_settings_that_no_record_has(module: Any, seed: int):
    """A literal sampler is plain: rows unpadded by hand, no compaction, no store. The engine must do what it does."""
    recorded = module.made_up(seed)
    result = module.literal(recorded)
    made = dataclasses.replace(recorded, ids=result.ids, nfe=len(result.forwards), forwards=result.forwards)
    assert family_of(made.case) is module
    verdict(made)
