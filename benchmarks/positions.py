"""How many positions of a row a cache policy feeds at each step of a fixed schedule: what counts are held against.

Owns arithmetic alone, for rows of one prompt length, all in the same block. Policies and their settings are those of
`rl4dlm.rollout.caches`; what they mean is said there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """A fixed schedule.

    Args:
        prompt: P. canvas: L. block: b, divides L. per_step: k tokens written per step, divides b.
        left_to_right: attention has blocks, which are those that are written, and start with the canvas.
    """

    prompt: int
    canvas: int
    block: int
    per_step: int
    left_to_right: bool = False

    @property
    def columns(self) -> int:
        """S."""
        return self.prompt + self.canvas

    @property
    def steps_per_block(self) -> int:
        """s."""
        return self.block // self.per_step

    @property
    def steps(self) -> int:
        """Of the whole canvas."""
        return self.canvas // self.per_step


@dataclass(frozen=True)
class At:
    """A step.

    Args:
        step: of the row, from 0. block: number of the active block. inside: step in that block, from 0.
        start, stop: first column of the block, and the one behind its last.
        masked: masked slots of the canvas before the step. open: those of the block.
    """

    step: int
    block: int
    inside: int
    start: int
    stop: int
    masked: int
    open: int


def steps(grid: Grid) -> list[At]:
    """Every step of a row."""
    found = []
    for block in range(grid.canvas // grid.block):
        start = grid.prompt + block * grid.block
        for inside in range(grid.steps_per_block):
            step = block * grid.steps_per_block + inside
            masked, still = grid.canvas - step * grid.per_step, grid.block - inside * grid.per_step
            found.append(At(step, block, inside, start, start + grid.block, masked, still))
    return found


def positions_fed(grid: Grid, cache: str, arguments: Mapping[str, Any] | None = None) -> list[int]:
    """Positions of a row fed at each step. `arguments` as in `DecodingConfig.cache_args`, defaults where left out.

    Raises:
        ValueError: there is no formula for the policy, or none where attention is left to right.
    """
    if grid.left_to_right:
        if cache not in ("none", "prefix", "dual"):
            raise ValueError(f"cache={cache!r} has no formula where attention is left to right")
        return [_exact(at, grid) if cache != "none" else at.stop for at in steps(grid)]
    if cache not in FORMULAS:
        raise ValueError(f"cache={cache!r} has no formula; there are those of {', '.join(FORMULAS)}")
    return [FORMULAS[cache](at, grid, **(arguments or {})) for at in steps(grid)]


def _exact(at: At, grid: Grid) -> int:
    """The exact block cache: the block, and at its first step also the one before it, or the prompt."""
    if at.inside:
        return grid.block
    return 2 * grid.block if at.block else at.stop


def _refreshes(at: At, grid: Grid, blocks: int | None, inside: int | None) -> bool:
    """At the first step, so many blocks after the block of the last refresh, and after so many steps in a block."""
    if at.inside:
        return inside is not None and at.inside % inside == 0
    within = inside is not None and inside < grid.steps_per_block  # every block has a refresh of its own
    return at.block == 0 or (blocks is not None and (blocks == 1 if within else at.block % blocks == 0))


def _none(at: At, grid: Grid) -> int:
    return grid.columns


def _prefix(
    at: At, grid: Grid, refresh_blocks: int = 1, refresh_steps: int | None = None, suffix_window: int | None = None
) -> int:
    if _refreshes(at, grid, refresh_blocks, refresh_steps):
        return grid.columns
    last = grid.columns if suffix_window is None else min(at.stop + suffix_window, grid.columns)
    return last - (at.start if at.inside else at.start - grid.block)


def _dual(at: At, grid: Grid, refresh_blocks: int = 1, refresh_steps: int | None = None) -> int:
    return _prefix(at, grid, refresh_blocks, refresh_steps, suffix_window=0)


def _dual_masked(at: At, grid: Grid, refresh_blocks: int = 1, refresh_steps: int | None = None) -> int:
    return grid.columns if _refreshes(at, grid, refresh_blocks, refresh_steps) else at.open + grid.per_step


def _frozen_prompt(at: At, grid: Grid) -> int:
    if at.step == 0:
        return grid.columns
    return grid.columns - (at.start if at.inside else at.start - grid.block)


def _delayed_prefix(at: At, grid: Grid) -> int:
    """With a delay of one step: the first of a block is full, the second feeds the block before, too."""
    if at.inside == 0:
        return grid.columns
    return grid.columns - (at.start - grid.block if at.block and at.inside == 1 else at.start)


def _dkv_decode(at: At, grid: Grid, refresh_steps: int | None = 8) -> int:
    return grid.columns if _refreshes(at, grid, 1, refresh_steps) else at.masked + grid.per_step


def _dkv_prefill(at: At, grid: Grid) -> int:
    return grid.canvas if at.step else grid.columns


def _dkv_greedy(at: At, grid: Grid, window: int = 4, refresh_steps: int = 2) -> int:
    if at.inside % refresh_steps == 0:
        return grid.columns
    return 2 * grid.per_step + min(window * grid.per_step, at.masked - grid.per_step)


def _vicinity(
    at: At, grid: Grid, before: int = 16, after: int = 16, warmup_steps: int = 4, refresh_steps: int | None = None
) -> int:
    if at.step < warmup_steps or _refreshes(at, grid, 1, refresh_steps):
        return grid.columns
    return min(at.stop + after, grid.columns) - max(at.start - before, 0)


FORMULAS = {
    "none": _none,
    "prefix": _prefix,
    "dual": _dual,
    "dual_masked": _dual_masked,
    "vicinity": _vicinity,
    "frozen_prompt": _frozen_prompt,
    "delayed_prefix": _delayed_prefix,
    "dkv_decode": _dkv_decode,
    "dkv_prefill": _dkv_prefill,
    "dkv_greedy": _dkv_greedy,
}
"""Positions of a row that a step feeds where attention is full, by policy."""
