"""Decides whether a run of ours agrees with a record: equal, or different exactly as stated rules predict."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conformance.literals import family_of
from tests.conformance.literals.tools import MASK_IN_PROMPT
from tests.conformance.samplers import Recorded, Run, run_engine


def verdict(recorded: Recorded) -> set[str]:
    """The rules that explain the difference between record and engine; empty if they are equal.

    Raises AssertionError if the rules do not predict the record, or do not lead from the record to what the engine did.
    """
    family = family_of(recorded.case)
    differs = getattr(family, "difference", difference)
    ours = None
    if recorded.masks_in_prompt:
        with pytest.raises(ValueError, match="contains the mask token"):
            run_engine(recorded, family)
    else:
        ours = run_engine(recorded, family)
        if not differs(recorded, ours):
            return set()
    theirs = family.literal(recorded)
    assert theirs.rules, f"no rule explains why {differs(recorded, ours)}"
    assert torch.equal(theirs.ids, recorded.ids), f"{theirs.rules} do not predict the recorded ids"
    assert len(theirs.forwards) == recorded.nfe, f"{theirs.rules} do not predict the recorded number of forwards"
    if recorded.forwards is not None:
        for step, (fed, expected) in enumerate(zip(theirs.forwards, recorded.forwards, strict=True)):
            assert torch.equal(fed, expected), f"{theirs.rules} do not predict what was fed at forward {step}"
    if ours is None:
        assert MASK_IN_PROMPT in theirs.rules
        return theirs.rules
    predicted = family.literal(recorded, deviations=False).working()
    assert torch.equal(ours.ids, predicted.ids), f"{theirs.rules} do not predict our ids"
    assert ours.nfe == predicted.nfe, f"{theirs.rules} do not predict our forwards"
    if ours.fed is not None and predicted.fed is not None:
        assert not _first_unequal(ours.fed, predicted.fed), f"{theirs.rules} do not predict what we feed"
    for mine, expected in zip(ours.states, predicted.states, strict=True):
        assert torch.equal(torch.stack(mine), torch.stack(expected)), f"{theirs.rules} do not predict our states"
    return theirs.rules


def difference(recorded: Recorded, ours: Run | None) -> str:
    """In what a run differs from the record; empty when in nothing."""
    if ours is None:
        return "the prompt is refused"
    if not torch.equal(ours.ids, recorded.ids):
        return f"ids differ: {ours.ids.tolist()}"
    if any(n != recorded.nfe for n in ours.nfe):
        return f"forwards differ: {ours.nfe} and {recorded.nfe}"
    if recorded.forwards is not None and len(recorded.forwards) != recorded.nfe:
        return f"the record counts {recorded.nfe} forwards and lists {len(recorded.forwards)}"
    if ours.fed is not None and recorded.forwards is not None:
        return _first_unequal(ours.fed, recorded.forwards)
    for step, fed in enumerate(recorded.forwards or ()):
        state = torch.stack([row[step] for row in ours.states])[:, -fed.shape[1] :]
        if not torch.equal(state, fed):
            return f"states differ before forward {step}"
    return ""


def _first_unequal(fed: list[Tensor], expected: list[Tensor]) -> str:
    """Which forwards are fed something else than expected; empty when none is."""
    if len(fed) != len(expected):
        return f"{len(fed)} forwards are made and {len(expected)} expected"
    pairs = zip(fed, expected, strict=True)
    found = [step for step, (mine, other) in enumerate(pairs) if not torch.equal(mine, other)]
    return f"what is fed differs at forwards {found}" if found else ""
