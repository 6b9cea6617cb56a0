"""The trainers of `tests/training`."""

from __future__ import annotations

from tests.training.conftest import (
    build_trainer as build_trainer,
)
