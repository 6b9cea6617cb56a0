"""Rollouts in which slots come and go: scored as finished texts, refused where the steps are scored."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import trainer_families

EDITS = {
    "schedule": "levenshtein",
    "schedule_args": {"delete_token_id": 90, "insert_token_id": 91, "threshold": 0.02, "max_post_steps": 2},
    "denoising_steps": None,
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("trainer", "family", "said"),
    [
        ("EBPO", "llada2", None),
        ("CJGRPO", "llada2", "schedule='levenshtein' is not allowed: it takes tokens back, replaces or moves them"),
        ("TraceRL", "llada", "schedule='levenshtein' is not allowed: it takes tokens back, replaces or moves them"),
        (
            "MDPO",
            "llada",
            "schedule='levenshtein' is not allowed: it changes the length of the canvas, takes slots out",
        ),
        (
            "IGPO",
            "llada",
            "schedule='levenshtein' cannot have: it changes the length of the canvas, or takes slots out",
        ),
        ("TreeRPO", "llada", "schedule='levenshtein'"),
    ],
)
def test_steps_of_which_slots_move_are_not_scored(
    trainer: str, family: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**trainer_families.SETTINGS.get(trainer, {}), **EDITS}
    monkeypatch.setitem(trainer_families.SETTINGS, trainer, settings)
    found = trainer_families.refusal(trainer, family)
    assert found is None if said is None else said in str(found)
