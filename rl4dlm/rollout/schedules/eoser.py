"""EOS early rejection and ascending step sizes (Yang et al., arXiv 2509.23924), alone and together.

When a long canvas is decoded as one block, end-of-sequence tokens are confident early and fill it from behind.
`eoser` multiplies the confidence of candidates that end the sequence by a factor that rises from `min_gamma` to
`max_gamma` over the steps of a block: it changes which positions are written, never what is written there. `ass` writes
1, 2, 4, ... tokens at its S = floor(log2 L) steps, and all that is left at the last; with several blocks the last ones
take one step each and the first one all the steps before. `eoser_ass` does both.

Differences from the released code: the factor reaches `max_gamma` at the last step of every block (there the step
within the block is divided by the number of all steps, so that with several blocks it restarts and stays low), it
applies to every end-of-sequence token of the model, and steps are not silently rounded to a whole number per block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import BlockStart, Confidence, Schedule, Step, even_top, probability, top
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class EOSERArguments:
    """Settings of `eoser`.

    Args:
        min_gamma: what the confidence of an end-of-sequence token is multiplied by at the first step, 0 to 1.
        max_gamma: at the last one, `min_gamma` to 1. With both at 1 it is `low_confidence`.
    """

    min_gamma: float = 0.4
    max_gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_gammas(self)


@dataclass(frozen=True)
class ASSArguments:
    """Settings of `ass`.

    Args:
        num_blocks: blocks that are written left to right, at most floor(log2 L) on a canvas of L slots.
    """

    num_blocks: int = 1

    def __post_init__(self) -> None:
        check_count(self, "num_blocks", 1)


@dataclass(frozen=True)
class EOSERASSArguments:
    """Settings of `eoser_ass`: those of both."""

    num_blocks: int = 1
    min_gamma: float = 0.01
    max_gamma: float = 1.0

    def __post_init__(self) -> None:
        check_count(self, "num_blocks", 1)
        _check_gammas(self)


@register("eoser", EOSERArguments, fixed_forwards=True)
def eoser(arguments: EOSERArguments, config: Any) -> Schedule:
    """Even counts, most confident first, end-of-sequence tokens discounted at early steps."""
    last = config.steps_per_block - 1

    def progress(step: Step) -> Tensor:
        return (step.step.double() / last).clamp(max=1) if last > 0 else torch.ones_like(step.step)

    confidence = discounted(progress, arguments.min_gamma, arguments.max_gamma)
    return Schedule(fixed_blocks(config), confidence, even_top(config.steps_per_block), memoryless=True)


@register("ass", ASSArguments, takes_steps=False, fixed_forwards=True)
def ass(arguments: ASSArguments, config: Any) -> Schedule:
    """Twice as many tokens at each step as at the one before."""
    return _ascending(arguments.num_blocks, config, lambda ascent: probability)


@register("eoser_ass", EOSERASSArguments, takes_steps=False, fixed_forwards=True)
def eoser_ass(arguments: EOSERASSArguments, config: Any) -> Schedule:
    """The same with end-of-sequence tokens discounted; progress is the share of tokens written after the step."""

    def confidence(ascent: Ascent) -> Confidence:
        def progress(step: Step) -> Tensor:
            return (2 ** (ascent.index(step) + 1) - 1) / 2**ascent.steps

        return discounted(progress, arguments.min_gamma, arguments.max_gamma)

    return _ascending(arguments.num_blocks, config, confidence)


def discounted(progress: Callable[[Step], Tensor], least: float, most: float) -> Confidence:
    """The candidate's probability, times `least + (most - least) * progress` where it ends the sequence.

    Args:
        progress: from the step to numbers `[R]` in [0, 1].
    """

    def confidence(step: Step) -> Tensor:
        scores = probability(step)
        factor = least + (most - least) * progress(step).to(scores.dtype)
        return torch.where(step.is_eos(step.drawn.token), factor[:, None] * scores, scores)

    return confidence


@dataclass(frozen=True)
class Ascent:
    """How ascending steps are laid out on a canvas.

    Args:
        length: slots L of the canvas. num_blocks: n.
    """

    length: int
    num_blocks: int

    @property
    def steps(self) -> int:
        """S = floor(log2 L), one at least."""
        return max(1, self.length.bit_length() - 1)

    @property
    def first_steps(self) -> int:
        """Steps that the first block takes; the others take one each."""
        return self.steps - self.num_blocks + 1

    @property
    def block_lengths(self) -> list[int]:
        """Slots of each block: what its steps write."""
        if self.num_blocks == 1:
            return [self.length]
        middle = [2**power for power in range(self.first_steps, self.steps - 1)]
        return [2**self.first_steps - 1, *middle, self.length - 2 ** (self.steps - 1) + 1]

    def index(self, step: Step) -> Tensor:
        """The number of the step over all blocks, long `[R]`, from 0."""
        return torch.where(step.block == 0, step.step, self.first_steps - 1 + step.block)

    def commit(self, step: Step, scores: Tensor) -> Tensor:
        """The best 2^j at step j; at the last step of a block, all of it."""
        index = self.index(step)
        counts = torch.where(index >= self.first_steps - 1, step.eligible.sum(-1), 2**index)
        return top(scores, step.eligible, counts)


@dataclass(frozen=True)
class GivenBlocks:
    """Blocks of given lengths, which are not those of any grid."""

    lengths: tuple[int, ...]
    on_grid: bool = False

    def end(self, rows: BlockStart) -> Tensor:
        ends = torch.tensor(list(itertools.accumulate(self.lengths)), device=rows.block.device)
        return ends[rows.block.clamp(0, len(ends) - 1)]

    def settle(self, step: Step) -> Tensor | None:
        return None


def _ascending(num_blocks: int, config: Any, confidence: Callable[[Ascent], Confidence]) -> Schedule:
    ascent = Ascent(config.canvas_length, num_blocks)
    if config.block_length is not None:
        raise ValueError(
            f"block_length={config.block_length} has no meaning for schedule={config.schedule!r}, whose blocks double "
            "in length; leave it None and set num_blocks in schedule_args"
        )
    if num_blocks > ascent.steps:
        raise ValueError(
            f"num_blocks={num_blocks} is not allowed; with canvas_length={config.canvas_length} there are "
            f"{ascent.steps} steps, at least one for each block"
        )
    return Schedule(GivenBlocks(tuple(ascent.block_lengths)), confidence(ascent), ascent.commit, memoryless=True)


def _check_gammas(arguments: EOSERArguments | EOSERASSArguments) -> None:
    check_number(arguments, "min_gamma", 0, 1)
    check_number(arguments, "max_gamma", 0, 1)
    if arguments.min_gamma > arguments.max_gamma:
        raise ValueError(
            f"min_gamma={arguments.min_gamma} is not allowed; it must not be larger than "
            f"max_gamma={arguments.max_gamma}"
        )
