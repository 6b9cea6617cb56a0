"""What schedules are made of: small functions over rows, none of which reads another row.

A schedule has a block policy (where it may write), a confidence (which candidates are good) and a commit rule (which of
them are written now). The engine owns the order of things, the eligible set and progress: it never commits outside the
eligible set, and writes the best candidate of a row whose rule picked none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Drawn
from rl4dlm.rollout.noise import NoiseSource


@dataclass(frozen=True)
class Window:
    """The active block of each row at one step; R rows, blocks of at most W positions.

    Args:
        eligible: bool `[R, W]`, masked positions of the block; everything else is undefined where this is False.
        positions: long `[R, W]`, canvas offsets, ascending.
        drawn: candidates, tensors `[R, W]`.
        step: long `[R]`, steps already made in this block. total_step: long `[R]`, steps already made in all.
        masked_at_start: long `[R]`, masked positions when the block was entered.
        row_ids: long `[R]`. noise: keyed by row id, step and position.
    """

    eligible: Tensor
    positions: Tensor
    drawn: Drawn
    step: Tensor
    total_step: Tensor
    masked_at_start: Tensor
    row_ids: Tensor
    noise: NoiseSource


Confidence = Callable[[Window], Tensor]
"""Scores `[R, W]`; higher is written earlier."""

CommitRule = Callable[[Window, Tensor], Tensor]
"""From the window and scores `[R, W]` to bool `[R, W]`: what is written in this step."""


@dataclass(frozen=True)
class FixedBlocks:
    """Blocks of equal length, written left to right. The last one, and a first one that started earlier, are shorter.

    Args:
        block_length: of a whole block. canvas_length: where the last one ends.
    """

    block_length: int
    canvas_length: int

    def bounds(self, block: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """First canvas offset of blocks, and the one behind their last.

        Args:
            block: long `[R]`, from 0.
            offset: long `[R]`, prompt tokens that are in the first block of each row, fewer than a whole block.

        Returns:
            long `[R]` each.
        """
        start = block * self.block_length - offset
        return start.clamp(min=0), (start + self.block_length).clamp(max=self.canvas_length)


@dataclass(frozen=True)
class Schedule:
    """The parts of a schedule."""

    blocks: FixedBlocks
    confidence: Confidence
    commit: CommitRule


@dataclass(frozen=True)
class CanvasSchedule:
    """The parts of a schedule that refines whole canvases of random tokens, any of which may change at any step.

    Args:
        max_steps: N, after which a canvas is finished whatever its state.
        temperature: of a step, from the steps n that remain with it, N to 1.
        accept: from entropies `[R, C]` in nats to bool `[R, C]`, the candidates that are kept until the next step.
        stability: steps for which the most probable tokens must have stayed the same before a canvas is finished.
        confidence: mean entropy in nats below which they must be.
    """

    max_steps: int
    temperature: Callable[[int], float]
    accept: Callable[[Tensor], Tensor]
    stability: int
    confidence: float


def probability(window: Window) -> Tensor:
    """The candidate's untempered probability (low-confidence remasking keeps the most confident)."""
    return window.drawn.confidence


def random_order(window: Window) -> Tensor:
    """Uniform scores: positions are written in random order."""
    rows, width = window.positions.shape
    row_ids, steps = (k[:, None].expand(rows, width).flatten() for k in (window.row_ids, window.total_step))
    return window.noise.uniform("order", row_ids, steps, window.positions.flatten()).view(rows, width)


def even_counts(masked: Tensor, steps: int, step: Tensor) -> Tensor:
    """How many tokens an even schedule writes at a step: `masked` shared out over `steps`, the rest on the first ones.

    Args:
        masked: long `[R]`. steps: number of steps S. step: long `[R]`, from 0.

    Returns:
        long `[R]`: `masked // S`, one more while `step < masked % S` (LLaDA, arXiv 2502.09992).
    """
    return masked // steps + (step < masked % steps).long()


def even_top(steps: int) -> CommitRule:
    """Commits the best positions, an even number at each of `steps` steps per block."""

    def rule(window: Window, scores: Tensor) -> Tensor:
        counts = even_counts(window.masked_at_start, steps, window.step)
        return top(scores, window.eligible, counts)

    return rule


def above(threshold: float) -> CommitRule:
    """Commits every position whose score reaches the threshold."""
    return lambda window, scores: scores >= threshold


def top(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """The best `counts` `[R]` eligible positions of each row, the lower position among equals: bool `[R, W]`."""
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    first = eligible.gather(-1, by_score).long().argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(-1, first)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < counts[:, None]) & eligible
