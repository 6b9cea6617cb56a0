"""Schedules: which positions are written when. One file per family; importing this registers them all."""

from __future__ import annotations

from rl4dlm.rollout.schedules import entropy_bound_canvas, llada, threshold
from rl4dlm.rollout.schedules.registry import register

__all__ = ["entropy_bound_canvas", "llada", "register", "threshold"]
