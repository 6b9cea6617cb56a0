"""Which recorded steps are scored and what they count for: the selectors of `rl4dlm.likelihood.steps`.

- `AllSteps`, `Segments` and `BlockSlices` score each drawn token once, which is checked.
- `SampledSteps` scores some, with weights that make sums over steps unbiased whatever they are drawn by.
- `EntropyThreshold` and `Flagged` keep a step by what was known before it, so that what is left is a policy gradient
  still. `TopEntropy` does not: whether a step is among the K largest of its row depends on later ones, so that even a
  constant reward has a gradient, and advantages must be centred by group (enumerated in the tests).

A model that denoises block by block is scored with finished blocks before each block, whatever a view hides of them
(`scoring.py`). `BlockSlices` uses this: its k-th view holds the k-th step of every block at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import RowNoise, check_choice, check_count
from rl4dlm.likelihood.steps import NO_STEP, StepSelector, Trail, dense
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.attention import BLOCK_KINDS, block_starts, position_ids
from rl4dlm.models.spec import DiffusionSpec

PROPOSALS = ("uniform", "entropy")
STEP_SCALES = ("sum", "mean")


@dataclass(frozen=True)
class AllSteps(StepSelector):
    """Every step, `merge` of them at a time.

    Args:
        merge: 1 is exact; as many as there are steps is the mean field.
    """

    complete: ClassVar[bool] = True
    merge: int = 1

    def __post_init__(self) -> None:
        check_count("merge", self.merge)

    @property
    def exact(self) -> bool:
        return self.merge == 1

    def merged(self, step: Tensor, counted: Tensor) -> Tensor:
        """Every `merge` steps are one."""
        return step.div(self.merge, rounding_mode="floor")

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """1."""
        return (trail.tokens > 0).double()


@dataclass(frozen=True)
class Segments(StepSelector):
    """A row's steps, up to the last that wrote a token in scope, in N stretches of equal length (d2-StepMerge).

    Args:
        count: N; 1 is the mean field. Rows with fewer steps have as many stretches as steps.
    """

    complete: ClassVar[bool] = True
    count: int = 8

    def __post_init__(self) -> None:
        check_count("count", self.count)

    @property
    def exact(self) -> bool:
        return False

    def merged(self, step: Tensor, counted: Tensor) -> Tensor:
        """Step s of S is in stretch floor(s N / S)."""
        steps = 1 + step.masked_fill(~counted, -1).amax(-1, keepdim=True)
        count = steps.clamp(min=1, max=self.count)
        return torch.minimum((step * count).div(steps.clamp(min=1), rounding_mode="floor"), count)

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """1."""
        return (trail.tokens > 0).double()


@dataclass(frozen=True)
class BlockSlices(StepSelector):
    """Steps counted in each block of a model that denoises block by block: view k has the k-th of every block.

    Args:
        spec: of the model, which says where blocks are.
        merge: so many steps of a block are one.

    Raises:
        ValueError: the model's attention has no blocks, so that such a view is no state of it.
    """

    complete: ClassVar[bool] = True
    spec: DiffusionSpec
    merge: int = 1

    def __post_init__(self) -> None:
        check_count("merge", self.merge)
        if self.spec.attention not in BLOCK_KINDS:
            raise ValueError(
                f"steps='block_slices' is not allowed for a model with attention={self.spec.attention!r}, which sees "
                f"unfinished blocks; allowed: {', '.join(BLOCK_KINDS)}"
            )

    @property
    def exact(self) -> bool:
        return self.merge == 1

    def numbered(self, rows: Rows) -> Tensor:
        """Counted in a token's own block."""
        step = super().numbered(rows)
        block = self.blocks(rows)
        # Steps of a block follow each other, so that its own are numbered by its first one.
        both = dense(block * (step.shape[1] + 1) + step, step >= 0)
        start = torch.full_like(both, NO_STEP)
        start = start.scatter_reduce(-1, block, both.masked_fill(step < 0, NO_STEP), "amin")
        return both - start.gather(-1, block)

    def blocks(self, rows: Rows) -> Tensor:
        """The number `[B, L]` of each token's block in its canvas."""
        positions = position_ids(rows.attention_mask)
        starts = block_starts(self.spec, positions, rows.prompt_mask.sum(-1))
        canvas = starts[:, -rows.canvas_ids.shape[1] :]
        return dense(canvas, torch.ones_like(canvas, dtype=torch.bool))

    def merged(self, step: Tensor, counted: Tensor) -> Tensor:
        """Every `merge` steps of a block are one."""
        return step.div(self.merge, rounding_mode="floor")

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """1."""
        return (trail.tokens > 0).double()


@dataclass(frozen=True)
class SampledSteps(StepSelector):
    """K steps drawn from those of a row that wrote tokens in scope, with weights 1 / (K q) (AGRPO, arXiv 2510.04019).

    The K numbers that steps are drawn by are spread evenly over a row, and rows by their ids; each is uniform by
    itself, so that the sum over steps is estimated without bias. A step that is drawn twice counts twice.

    Args:
        count: K.
        proposal: q, `"uniform"` or in proportion to the mean `"entropy"` of what a step wrote, which was known before
            it was drawn; no step has less than a thousandth of an even share.
        scale: `"sum"`: weights 1 / (K q), an estimate of the sum over the row's S steps. `"mean"`: that over S, which
            is what AGRPO's code computes.
    """

    fresh: ClassVar[bool] = True
    count: int = 8
    proposal: str = "uniform"
    scale: str = "sum"

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_choice("proposal", self.proposal, PROPOSALS)
        check_choice("scale", self.scale, STEP_SCALES)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("entropy",) if self.proposal == "entropy" else ()

    def probabilities(self, trail: Trail) -> Tensor:
        """q, float64 `[B, L]`, by the number of the step; adds up to 1 over those with tokens."""
        there = (trail.tokens > 0).double()
        share = there
        if self.proposal == "entropy":
            assert trail.rows.facts is not None and trail.rows.facts.entropy is not None
            share = trail.mean(trail.rows.facts.entropy.double()).clamp(min=0) * there
            even = share.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
            share = torch.maximum(share, 1e-3 * torch.where(even > 0, even, 1.0)) * there
        return share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """How often a step was drawn, over K q."""
        q = self.probabilities(trail)
        upto = q.cumsum(-1)
        level = noise.spread("scored steps", self.count, "rows") * upto[:, -1:]
        step = (torch.searchsorted(upto, level, right=True)).clamp(max=q.shape[1] - 1)
        drawn = torch.zeros_like(q).scatter_add(-1, step, torch.ones_like(level))
        weight = torch.where(q > 0, drawn / (self.count * q.clamp(min=torch.finfo(q.dtype).tiny)), 0.0)
        if self.scale == "mean":
            weight = weight / (trail.tokens > 0).sum(-1, keepdim=True).clamp(min=1)
        return weight


@dataclass(frozen=True)
class TopEntropy(StepSelector):
    """The K steps of a row whose tokens' mean entropy is largest, as EGSPO (arXiv 2603.12554) has it; see above.

    Args:
        count: K. Of equal ones the earlier.
    """

    partial: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("entropy",)
    count: int = 8

    def __post_init__(self) -> None:
        check_count("count", self.count)

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """1 for those."""
        entropy = step_entropy(trail).masked_fill(trail.tokens == 0, -torch.inf)
        rank = entropy.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
        return (rank < self.count).double()


@dataclass(frozen=True)
class EntropyThreshold(StepSelector):
    """The steps whose tokens' mean entropy reaches a row's threshold, which must not depend on the row."""

    partial: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("entropy", "threshold")

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """1 for those."""
        assert trail.rows.facts is not None and trail.rows.facts.threshold is not None
        return (step_entropy(trail) >= trail.rows.facts.threshold[:, None]).double()


@dataclass(frozen=True)
class Flagged(StepSelector):
    """The steps at which nothing was sure enough, so that something was written nevertheless (ForkGRPO).

    Args:
        threshold: what the probability of a candidate had to reach, in schedules that write what reaches it.
    """

    partial: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("confidence",)
    threshold: float = 0.9

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """1 for those."""
        assert trail.rows.facts is not None and trail.rows.facts.confidence is not None
        return (trail.largest(trail.rows.facts.confidence) < self.threshold).double()


def step_entropy(trail: Trail) -> Tensor:
    """The mean entropy `[B, L]`, in nats, of what each step wrote, by its number."""
    assert trail.rows.facts is not None and trail.rows.facts.entropy is not None
    return trail.mean(trail.rows.facts.entropy)
