"""What lengths of canvas a model was taught to fill, and the warning where it is asked for another one.

Owns the entry `diffusion_taught` of a configuration, which supervised training writes and config.json keeps.
"""

from __future__ import annotations

import logging
from typing import Any

from rl4dlm.models.adapters import base_model

logger = logging.getLogger(__name__)

TAUGHT = "diffusion_taught"


def record_taught(config: Any, eos_padding: str, canvas_length: int | None, max_length: int | None) -> None:
    """Writes down how completions were padded: `"canvas"`, to `canvas_length`, and so on as in `DiffusionSFTConfig`."""
    setattr(
        config, TAUGHT, {"eos_padding": eos_padding, "max_completion_length": canvas_length, "max_length": max_length}
    )


def canvas_problem(config: Any, canvas_length: int) -> str | None:
    """What is to be expected of a canvas of this length, if it is not what the model was taught; None: nothing."""
    taught = getattr(config, TAUGHT, None) or {}
    length = taught.get("max_completion_length")
    if taught.get("eos_padding") != "canvas" or length is None or canvas_length == length:
        return None
    return (
        f"canvas_length={canvas_length}, but the model was taught with eos_padding='canvas' at "
        f"max_completion_length={length}: on another canvas it may end at once, with empty answers; decode with "
        f"{length}, or train on canvases of that length"
    )


def warn_of_canvas(model: Any, canvas_length: int) -> None:
    """Logs `canvas_problem` of a model, wrapped in an adapter or not, as a warning."""
    base = base_model(model)
    problem = canvas_problem(base.config, canvas_length)
    if problem is not None:
        logger.warning("%s", problem)
