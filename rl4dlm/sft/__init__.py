"""Supervised training of denoisers, its data, and the adaptation of autoregressive models."""

from __future__ import annotations
