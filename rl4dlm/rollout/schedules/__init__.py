"""Schedules: which positions are written when. One file per family; importing this registers them all."""

from __future__ import annotations

from rl4dlm.rollout.schedules import llada, threshold
from rl4dlm.rollout.schedules.registry import register

__all__ = ["llada", "register", "threshold"]
