"""The forms in which a checkpoint can be written; importing it needs no torch."""

from __future__ import annotations

FORMS = ("rl4dlm", "hub")
"""`"rl4dlm"`: a stock transformers class and its spec; `"hub"`: the published form of the model's family."""
