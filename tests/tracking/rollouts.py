"""Rollouts to be shown: real ones of every kind of trace, and one with each kind of event, written by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from rl4dlm.models.tiny import tiny_diffusion_gemma
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Events, Rollout, Trace
from rl4dlm.tracking.replay import BlockLog
from tests.rollout.denoisers import MASK, PROMPTS, denoiser

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u2028 \"'&\\",
    "\x1b]0;title\x07\x1b[2J",
    "\x9b31m",
    "\u202egnp",
    "\r\b",
]
"""What a model may write to break out of a page or to command a terminal."""

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"steps": 6, "block_length": 4},
    "sampled": {"steps": 6, "temperature": 1.0, "cfg_scale": 0.5},
    "ends early": {"schedule": "left_to_right", "steps": 12, "temperature": 3.0},
    "given tokens": {"steps": 6},
    "takes back": {"schedule": "rcr", "steps": 6, "temperature": 1.0},
    "takes back around given tokens": {"schedule": "rcr", "steps": 6},
    "verifies": {"schedule": "wino", "schedule_args": {"threshold": 0.3}},
    "replaces": {"schedule": "editing", "schedule_args": {"threshold": 0.3, "editing_threshold": 0.1}},
    "edits": {
        "block_length": 4,
        "schedule": "levenshtein",
        "schedule_args": {"delete_token_id": 7, "insert_token_id": 8, "threshold": 0.3, "max_post_steps": 4},
        "temperature": 1.0,
    },
    "grows": {"schedule": "daedal", "schedule_args": {"start_length": 4, "growth": 3, "low": 0.5, "end_slots": 2}},
    "refines": {"schedule": "entropy_bound_canvas", "temperature": 0.8, "schedule_args": {"max_steps": 6}},
}


class Words:
    """A tokenizer that knows a few ids, some with texts that mean harm."""

    def __init__(self, special: Sequence[str] = HOSTILE) -> None:
        self.texts = {3 + i: text for i, text in enumerate(special)}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.texts.get(token, chr(97 + token % 26)) for token in ids)

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self.decode(row) for row in rows]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([token]) for token in ids]


@functools.cache
def decoded(name: str) -> tuple[Rollout, BlockLog]:
    """A rollout of five rows and the blocks that were active; shared, so never change it."""
    settings = DecodingConfig(**{"canvas_length": 12, **SETTINGS[name]})
    if name == "refines":
        model = tiny_diffusion_gemma(initializer_range=0.3)
        return RolloutEngine(model).generate(PROMPTS, settings, seed=4), BlockLog()
    blocks = BlockLog()
    hints = [{2: 5, 7: 6}] * len(PROMPTS) if name.endswith("given tokens") else None
    engine = RolloutEngine(denoiser(), max_batch_rows=3)
    return engine.generate(PROMPTS, settings, seed=4, hints=hints, on_step=blocks), blocks


def by_hand() -> Rollout:
    """One row of at most 6 slots that starts with 4: every kind of event happens to it, and one slot is given."""
    events = [  # step, kind, position, token, confidence
        (0, EventKind.COMMIT, 1, 11, 0.5),
        (0, EventKind.COMMIT, 3, 12, 0.25),
        (0, EventKind.REMASK, 3, 12, 0.0),
        (1, EventKind.COMMIT, 0, 13, 0.5),
        (1, EventKind.REPLACE, 1, 14, 0.75),
        (2, EventKind.REMASK, 0, 13, 0.0),
        (2, EventKind.INSERT, 1, MASK, 0.0),
        (2, EventKind.INSERT, 1, 15, 0.0),
        (3, EventKind.COMMIT, 0, 16, 0.5),
        (3, EventKind.TRUNCATE, 3, -1, 0.0),
    ]
    step, kind, position, token, confidence = zip(*events, strict=True)
    log_probs = torch.tensor(confidence).clamp(min=0.125).log()
    canvas, one = torch.tensor([[16, 15, MASK, 1, 1, 1]]), torch.ones(1, dtype=torch.long)
    trace = Trace(
        commit_step=torch.tensor([[3, -1, -1, -1, -1, -1]]),
        raw_log_prob=torch.zeros(1, 6),
        log_prob=None,
        steps=4 * one,
        events=Events(
            row=torch.zeros(len(events), dtype=torch.long),
            step=torch.tensor(step),
            kind=torch.tensor([int(k) for k in kind]),
            position=torch.tensor(position),
            token=torch.tensor(token),
            raw_log_prob=log_probs,
            log_prob=torch.zeros(len(events)),
            confidence=torch.tensor(confidence),
        ),
        start_length=4 * one,
        length=3 * one,
    )
    return Rollout(
        prompt_ids=[[3, 4]],
        canvas=canvas,
        valid=canvas != 1,
        hinted=torch.zeros(1, 6, dtype=torch.bool),
        trace=trace,
        nfe=8 * one,
        stop_reason=["eos"],
        row_ids=[7],
        schedule="by_hand",
        cache="none",
        exact=True,
        seed=0,
        mask_token_id=MASK,
        extra_forwards=0 * one,
    )
