"""Refuses to let a denoiser write left to right, which prints garbage without an error.

Owns that refusal. How a denoiser writes is the rollout engine's.
"""

from __future__ import annotations

from typing import Any, NoReturn

from rl4dlm.models.canvas import denoises_canvases


def refuse_generate(model: Any) -> None:
    """Replaces `generate` of a model (not wrapped) by one that says what to use.

    A model with a decoding loop of its own keeps it, and so does one whose attention is causal, which can write left
    to right.
    """
    spec = getattr(model.config, "diffusion", None) or {}
    if spec.get("attention") != "causal" and not denoises_canvases(model):
        model.generate = _refuse


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "generate() writes from left to right, and this model denoises: what it would write is garbage. Use "
        "rl4dlm.RolloutEngine(model).generate([prompt_ids], DecodingConfig(canvas_length=...)), or `rl4dlm decode`"
    )
