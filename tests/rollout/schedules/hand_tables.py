"""Denoisers whose wishes are written by hand: for each state of the canvas, a token and its probability per slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from tests.rollout.table_model import TableModel

VOCAB, MASK, EOS = 12, 2, 1
A, B, C, D, E = 5, 6, 7, 8, 9
PROMPT = [3]

Wish = tuple[int, float]
Wishes = Callable[[tuple[int, ...]], Sequence[Wish]]
"""From a canvas, the mask token in open slots, to the most probable token of each slot and its probability."""


def denoiser(wishes: Wishes) -> TableModel:
    """A model of canvases behind a prompt of one token; what a wish leaves over is shared out evenly."""

    def table(tokens: tuple[int, ...]) -> Tensor:
        if tokens[: len(PROMPT)] != tuple(PROMPT):  # not a question of ours but a look at the head
            return torch.zeros(len(tokens), VOCAB, dtype=torch.float64)
        rows = [_logits((A, 0.5)), *(_logits(wish) for wish in wishes(tokens[len(PROMPT) :]))]
        return torch.stack(rows)

    return TableModel(table, VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))


def _logits(wish: Wish) -> Tensor:
    token, probability = wish
    probabilities = torch.full((VOCAB,), (1 - probability) / (VOCAB - 1), dtype=torch.float64)
    probabilities[token] = probability
    return probabilities.log()


def always(*wishes: Wish) -> Wishes:
    """The same wishes in every state."""
    return lambda canvas: wishes


def decode(wishes: Wishes, length: int, schedule: str, arguments: dict[str, Any] | None = None, **more: Any) -> Rollout:
    """One row, without an early stop unless asked for."""
    hints = more.pop("hints", None)
    settings = {"stop_at_eos": False, **more}
    config = DecodingConfig(canvas_length=length, schedule=schedule, schedule_args=arguments or {}, **settings)
    return RolloutEngine(denoiser(wishes)).generate([PROMPT], config, hints=hints)


def states(rollout: Rollout) -> list[list[int]]:
    """The first row's canvas before each step and at the end."""
    return [*(state[0].tolist() for state in rollout.states()), rollout.canvas[0].tolist()]


def happened(rollout: Rollout, kind: EventKind) -> list[tuple[int, int, int]]:
    """Events of a kind in the first row: step, slot, token."""
    assert rollout.trace.events is not None
    events = rollout.trace.events.of(kind)
    mine = events.row == 0
    return list(
        zip(events.step[mine].tolist(), events.position[mine].tolist(), events.token[mine].tolist(), strict=True)
    )
