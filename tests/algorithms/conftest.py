"""The small trainers of tests/training, for the tests of algorithms."""

from __future__ import annotations

from tests.training.conftest import (
    build_trainer as build_trainer,
    losses as losses,
    make_trainer as make_trainer,
    prompt_dataset as prompt_dataset,
    recording_estimator as recording_estimator,
    recording_trainer as recording_trainer,
)
