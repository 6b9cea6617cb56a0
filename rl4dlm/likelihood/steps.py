"""Views of recorded steps: the states a completion went through, and the tokens that were written in them.

A trajectory method scores tokens given what was there when they were written. With s(i) the step that wrote token i,
the view of the steps a..b hides every token with s(i) >= a and scores those with s(i) <= b, so that for a = b it is the
state before that step, and the score of a token is the log-probability that it was drawn with (before filters and
penalties). For a < b the steps are *merged*: their tokens are scored as if all had been written at once, a mean field
of the tokens in between (d2, arXiv 2509.21474; TraceRL's shrinkage, arXiv 2509.06949).

Steps are numbered per row, without gaps: 0 is the first that wrote something. Which of them are scored, and what they
count for, is a selector's business:

- `AllSteps`, `Segments` and `BlockSlices` score each drawn token once, which is checked.
- `SampledSteps` scores some, with weights that make sums over steps unbiased whatever they are drawn by.
- `EntropyThreshold` and `Flagged` keep a step by what was known before it, so that what is left is a policy gradient
  still. `TopEntropy` does not: whether a step is among the K largest of its row depends on later ones, so that even a
  constant reward has a gradient, and advantages must be centred by group (enumerated in the tests).

A model that denoises block by block is scored with finished blocks before each block, whatever a view hides of them
(`scoring.py`). `BlockSlices` uses this: its k-th view holds the k-th step of every block at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, check_choice, check_count, check_scope, in_scope
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import BLOCK_KINDS, block_starts, position_ids
from rl4dlm.models.spec import DiffusionSpec

PROPOSALS = ("uniform", "entropy")
STEP_SCALES = ("sum", "mean")
_NO_STEP = 2**62  # where nothing was written, behind all steps


@dataclass
class Steps:
    """K stretches of recorded steps of each row, `first..last`; nothing where `last < first`.

    Args:
        first, last: long `[B, K]`. weight: float64 `[B, K]`, what the tokens of a stretch count for.
    """

    first: Tensor
    last: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        if not self.first.shape == self.last.shape == self.weight.shape or self.first.dim() != 2:
            raise ValueError(
                f"first {list(self.first.shape)}, last {list(self.last.shape)} and weight {list(self.weight.shape)} "
                "must be [B, K]"
            )

    def __len__(self) -> int:
        return len(self.first)


@dataclass
class Trail:
    """The steps of a batch of rows and how they are put together, which selectors choose from.

    Args:
        step: long `[B, L]`, the step that wrote each token, -1 where nothing was drawn.
        group: long `[B, L]`, the merged step that it is part of, -1 likewise; it rises with the step.
        counted: bool `[B, L]`, drawn tokens in scope: those to be scored.
        tokens: long `[B, L]`, the number of counted tokens of each merged step, by its number.
        rows: the rows.
    """

    step: Tensor
    group: Tensor
    counted: Tensor
    tokens: Tensor
    rows: Rows

    def mean(self, values: Tensor) -> Tensor:
        """Means `[B, L]` of values `[B, L]` over all tokens that a merged step has written, counted or not.

        Those behind the end are in it, since which ones these are is known later only.
        """
        written = (self.group >= 0).to(values.dtype)
        empty, place = torch.zeros_like(values), self.group.clamp(min=0)
        total = empty.scatter_add(-1, place, values * written)
        return total / empty.scatter_add(-1, place, written).clamp(min=1)

    def largest(self, values: Tensor) -> Tensor:
        """As `mean`, the largest of the values, which are at least 0."""
        written = torch.where(self.group >= 0, values, torch.zeros_like(values))
        return torch.zeros_like(values).scatter_reduce(-1, self.group.clamp(min=0), written, "amax")


class StepSelector(ABC):
    """Chooses steps of recorded rows: a function of the record and keyed noise, nothing else.

    Attributes:
        fresh: whether each inner iteration chooses anew.
        complete: whether each drawn token in scope is scored exactly once.
        partial: whether means are over the chosen steps alone, and not over all of a row's.
        exact: whether tokens are scored in the state that they were written in, and not in that of an earlier step.
        reads: names of what it needs of `StepFacts`.
    """

    fresh: ClassVar[bool] = False
    complete: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()

    @property
    def exact(self) -> bool:
        return True

    def numbered(self, rows: Rows) -> Tensor:
        """The step `[B, L]` that wrote each token, counted from 0 without gaps; -1 where nothing was drawn."""
        assert rows.commit_step is not None
        return dense(rows.commit_step, rows.commit_step >= 0)

    def merged(self, step: Tensor, counted: Tensor) -> Tensor:
        """The merged step `[B, L]` of each token from its step."""
        return step

    @abstractmethod
    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """Weights float64 `[B, L]` of merged steps, by their number; 0 where one is not chosen or has no tokens."""

    def trail(self, rows: Rows, scope: str) -> Trail:
        """The steps of rows with a record.

        Raises:
            ValueError: rows without a record, or with tokens to be scored that nobody has drawn; a fact is missing.
        """
        if rows.commit_step is None:
            raise ValueError("recorded steps are needed: commit_step of the rows is None")
        for name in self.reads:
            if rows.facts is None or getattr(rows.facts, name) is None:
                raise ValueError(f"{type(self).__name__} needs {name} of each token, and it was not recorded")
        given = torch.zeros_like(rows.valid) if rows.given is None else rows.given
        within = in_scope(rows, scope) & ~given
        written = rows.commit_step >= 0
        if (within & ~written).any():
            row, slot = (within & ~written).nonzero()[0].tolist()
            raise ValueError(
                f"token {slot} of row {int(rows.row_ids[row])} is to be scored (scope={scope!r}) but was never drawn: "
                "its commit_step is negative"
            )
        step = self.numbered(rows).masked_fill(~written, -1)
        group = self.merged(step, within).masked_fill(~written, -1)
        tokens = torch.zeros_like(group).scatter_add(-1, group.clamp(min=0), within.long())
        return Trail(step, group, within, tokens, rows)

    def select(self, trail: Trail, noise: RowNoise) -> Steps:
        """The chosen steps, in their order, K as many as the row with most of them has and at least 1."""
        weight = torch.where(trail.tokens > 0, self.weigh(trail, noise), 0.0)
        chosen = weight != 0
        count = max(int(chosen.sum(-1).max()) if len(chosen) else 0, 1)
        place = (~chosen).long().argsort(dim=-1, stable=True)[:, :count]  # [B, K], numbers of merged steps
        there = chosen.gather(-1, place)
        group, written = trail.group.clamp(min=0), trail.group >= 0
        lowest = trail.step.masked_fill(~written, _NO_STEP)
        start = torch.full_like(trail.step, _NO_STEP).scatter_reduce(-1, group, lowest, "amin")
        end = torch.full_like(trail.step, -1).scatter_reduce(-1, group, trail.step, "amax")
        first = torch.where(there, start.gather(-1, place), 0)
        last = torch.where(there, end.gather(-1, place), -1)
        return Steps(first, last, torch.where(there, weight.gather(-1, place), 0.0))


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
        return (step * self.count).div(steps.clamp(min=1), rounding_mode="floor").clamp(max=self.count)

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
        start = torch.full_like(both, _NO_STEP)
        start = start.scatter_reduce(-1, block, both.masked_fill(step < 0, _NO_STEP), "amin")
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


@dataclass(frozen=True)
class RecordedSteps(Estimator):
    """Scores tokens in the states that they were written in, one view per chosen (merged) step.

    The number of views depends on the record; those that a row has fewer than others score nothing.

    Args:
        selector: which steps.
        scope: `"valid"` tokens or the whole `"canvas"`. A view shows what was there, behind the end, too.

    Raises:
        ValueError: an unknown scope; in `draw`, rows without a record or with tokens that nobody has drawn.
    """

    views_vary: ClassVar[bool] = True  # type: ignore[misc]
    selector: StepSelector
    scope: str = "valid"

    def __post_init__(self) -> None:
        check_scope(self.scope)

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        return self.selector.fresh

    @property
    def as_drawn(self) -> bool:  # type: ignore[override]
        return self.selector.exact

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        return self.selector.partial or getattr(self.selector, "scale", "sum") == "mean"

    def steps(self, rows: Rows, *, seed: int, iteration: int) -> Steps:
        """The steps that the views of `draw` are about."""
        return self._chosen(rows, seed, iteration)[1]

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """As many views as the row with most chosen steps has."""
        trail, steps = self._chosen(rows, seed, iteration)
        step = trail.step[:, None]
        first, last = steps.first[..., None], steps.last[..., None]
        given = torch.zeros_like(rows.valid) if rows.given is None else rows.given
        never = (trail.step < 0) & ~given
        hidden = (step >= first) | never[:, None]
        scored = trail.counted[:, None] & (step >= first) & (step <= last)
        if self.selector.complete and not (scored.sum(1) == trail.counted).all():
            raise RuntimeError(f"{self.selector} does not score each drawn token exactly once")
        prompt = hidden.new_zeros(*hidden.shape[:2], rows.prompt_ids.shape[1])
        return Views(torch.cat([prompt, hidden], dim=-1), scored * steps.weight[..., None])

    def units(self, rows: Rows, views: Views) -> Units:
        """Which tokens were scored together, and how many there are of what."""
        trail = self.selector.trail(rows, self.scope)
        scored = views.scored.any(1)
        view = views.scored.long().argmax(1)  # each token is scored in one view at most
        unit = dense(view, scored)
        if isinstance(self.selector, BlockSlices):  # a view has a step of each block, and these are not one
            unit = dense(self.selector.blocks(rows) * views.weight.shape[1] + view, scored)
        if self.selector.partial:
            return Units(unit, scored.sum(-1), 1 + unit.amax(-1))
        merged = trail.group
        if isinstance(self.selector, BlockSlices):
            merged = self.selector.blocks(rows) * (views.weight.shape[2] + 1) + merged
        return Units(unit, trail.counted.sum(-1), 1 + dense(merged, trail.counted).amax(-1))

    def _chosen(self, rows: Rows, seed: int, iteration: int) -> tuple[Trail, Steps]:
        trail = self.selector.trail(rows, self.scope)
        return trail, self.selector.select(trail, RowNoise(rows, seed, iteration))


@dataclass
class Units:
    """The (merged) steps of rows as units of a loss.

    Args:
        unit: long `[B, L]`, the number of a scored token's step among those scored, from 0; -1 elsewhere. Steps of
            different blocks are different ones, also where a view holds both.
        tokens: long `[B]`, tokens that a mean over a row is over. steps: long `[B]`, steps that it is over.
    """

    unit: Tensor
    tokens: Tensor
    steps: Tensor


def dense(keys: Tensor, counted: Tensor) -> Tensor:
    """Numbers `[B, L]` from 0 without gaps in the order of keys (long `[B, L]`, below 2^62) in each row.

    -1 where a token is not `counted`.
    """
    ordered, order = keys.masked_fill(~counted, _NO_STEP).sort(dim=-1)
    rises = torch.zeros_like(ordered)
    rises[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    return torch.empty_like(keys).scatter(-1, order, rises.cumsum(-1)).masked_fill(~counted, -1)
