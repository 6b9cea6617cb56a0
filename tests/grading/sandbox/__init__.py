"""Tests of the sandbox; those of verdicts and rewards are beside it."""

from __future__ import annotations
