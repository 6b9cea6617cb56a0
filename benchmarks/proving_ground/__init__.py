"""Small models on tasks with ends, lengths and search, and every algorithm on them, run by `../algorithms.py`."""

from __future__ import annotations
