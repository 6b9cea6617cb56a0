"""Which prompts a denoiser answers rightly on the way and wrongly in the end: over-denoising (MDPO, arXiv 2508.13148).

What each step would make of the whole answer is checked like the answer itself. Owns that sorting of prompts; decoding
is the engine's, judging is the task's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rl4dlm.evaluation.measure import completion_texts
from rl4dlm.models.loading import check_tokenizer
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.taught import warn_of_canvas
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.tasks.prompts import encode_prompt

if TYPE_CHECKING:
    from rl4dlm.tasks import Task

OUTCOMES = ("right", "lost", "wrong")
"""The answer is right; it is wrong, but some step had predicted a right one; it is wrong, and none had."""

ROWS = 64
"""Prompts decoded at a time: what their steps predict is kept until it is checked."""


def outcomes(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    config: DecodingConfig,
    *,
    seed: int = 0,
    batch_rows: int | None = None,
    progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str | None]:
    """One of `OUTCOMES` for each row of a task; None where the task cannot judge its answer.

    Args:
        model: a denoiser, see `load_denoiser`. tokenizer: of the model.
        task: whose checker to ask. rows: of the task, with a column `prompt`.
        config: how to decode; what steps predict is drawn at its temperature. Its `record` is not read.
        seed: keys every draw; a row's outcome does not depend on the other rows but by its place.
        batch_rows: prompts decoded at the same time, 64 by default.
        progress: shows a progress bar when decoding takes longer than a few seconds.
        chat_template_kwargs: for the chat template.

    Raises:
        ValueError: settings under which not every step predicts a whole answer.
    """
    spec = DiffusionSpec.of(model)
    check_tokenizer(tokenizer, spec)
    warn_of_canvas(model, config.canvas_length)
    config = replace(config, record=("fillings",), record_steps=None, num_fillings=1)
    engine = RolloutEngine(model, spec, progress=progress)
    prompts = [encode_prompt(tokenizer, row["prompt"], chat_template_kwargs=chat_template_kwargs) for row in rows]
    found: list[str | None] = []
    size = batch_rows or ROWS
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        ids = list(range(len(rows)))[part]
        rollout = engine.generate(prompts[part], config, row_ids=ids, seed=seed)
        texts = completion_texts(tokenizer, rollout, spec)
        finals = task.check_many(texts, rows[part])
        for row, (final, tried) in enumerate(zip(finals, _predicted(tokenizer, rollout, spec), strict=True)):
            if final is None or final:
                found.append(None if final is None else "right")
                continue
            verdicts = task.check_many(sorted(tried), [rows[start + row]] * len(tried))
            found.append("lost" if any(verdicts) else "wrong")
    return found


def _predicted(tokenizer: Any, rollout: Rollout, spec: DiffusionSpec) -> list[set[str]]:
    """The different texts that the steps of each row would have written."""
    fillings, texts = rollout.trace.fillings, [set[str]() for _ in range(len(rollout))]
    assert fillings is not None
    for step in range(fillings.shape[1]):
        made = (rollout.trace.steps > step).nonzero().squeeze(-1)
        canvas = torch.where((rollout.trace.steps > step)[:, None], fillings[:, step, 0].long(), rollout.canvas)
        other = replace(rollout, canvas=canvas, valid=valid_mask(canvas, spec.eos_token_ids))
        written = completion_texts(tokenizer, other, spec)
        for row in made.tolist():
            texts[row].add(written[row])
    return texts
