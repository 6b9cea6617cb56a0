"""Recorded scores, losses and gradients of the RL algorithms, a module per family of cases.

A family's module has `run(case, folder) -> Verdict`. It computes with the library's estimator and trainer, in `folder`,
everything that the case records and compares. It raises AssertionError where something differs that no rule predicts,
and where a case records nothing that it knows how to compute.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.conformance.cases import Case


class Verdict(NamedTuple):
    """How a case agrees with the library."""

    equal: bool
    """Scores, loss and gradients are those recorded. If not, `rules` turn ours into them."""

    rules: frozenset[str] = frozenset()
    """The stated differences that show in this case; with `equal`, in its logged metrics only."""


def run(case: Case, folder: Path) -> Verdict:
    """The verdict of the module that is named as the case's family."""
    verdict: Verdict = import_module(f"{__name__}.{case.family}").run(case, folder)
    assert verdict.equal or verdict.rules
    return verdict
