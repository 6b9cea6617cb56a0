"""Decoding of one row as the definitions of schedules say it, slot by slot, to compare the engine with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.rollout import Rollout
from tests.rollout.denoisers import MASK

Look = Callable[[list[int], list[int]], Tensor]
"""From a prompt and a canvas to its logits `[L, V]`."""

Rule = Callable[["Row", Tensor], set[int]]
"""From the row and its logits `[L, V]` to the slots that are written now."""


class Row:
    """A canvas on its way, block by block.

    Attributes: `canvas`, its tokens; `block`, the offsets of the active one; `step`, steps made in all; `block_step`,
    those made in the block; `token`, the candidates; `p`, their probabilities; `memory`, for rules to keep things in.
    """

    def __init__(self, length: int) -> None:
        self.canvas = [MASK] * length
        self.block = range(0)
        self.step = self.block_step = 0
        self.token: list[int] = []
        self.p: list[float] = []
        self.memory: dict[str, Any] = {}

    @property
    def masked(self) -> list[int]:
        """Open slots of the whole canvas."""
        return [i for i, token in enumerate(self.canvas) if token == MASK]

    @property
    def open(self) -> list[int]:
        """Open slots of the block."""
        return [i for i in self.masked if i in self.block]

    def candidates(self, logits: Tensor) -> None:
        """Takes the most probable token of each slot but the mask token."""
        allowed = logits.clone()
        allowed[:, MASK] = -torch.inf
        self.token = allowed.argmax(-1).tolist()
        self.p = [logits[i].softmax(-1)[token].item() for i, token in enumerate(self.token)]

    def best(self, slots: list[int]) -> int:
        """The slot of the most probable candidate, the lowest among equals."""
        return min(slots, key=lambda i: (-self.p[i], i))


def decode(length: int, block_length: int, look: Callable[[Row], Tensor], rule: Rule) -> tuple[list[int], list[int]]:
    """The finished canvas and the step at which each slot was written last; `look` gives logits `[L, V]` of a row."""
    row, written = Row(length), [-1] * length
    for start in range(0, length, block_length):
        row.block, row.block_step = range(start, start + block_length), 0
        while row.open:
            logits = look(row)
            row.candidates(logits)
            for i in rule(row, logits):
                row.canvas[i] = row.token[i]
                written[i] = row.step
            row.step, row.block_step = row.step + 1, row.block_step + 1
    return row.canvas, written


def assert_decodes(rollout: Rollout, index: int, expected: tuple[list[int], list[int]]) -> None:
    """Row `index` of a rollout is what `decode` gave."""
    canvas, written = expected
    assert rollout.canvas[index].tolist() == canvas
    assert rollout.trace.commit_step[index].tolist() == written
