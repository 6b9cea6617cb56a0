"""Views of recorded steps: the states a completion went through, and the tokens that were written in them.

A trajectory method scores tokens given what was there when they were written. With s(i) the step that wrote token i,
the view of the steps a..b hides every token with s(i) >= a and scores those with s(i) <= b, so that for a = b it is the
state before that step, and the score of a token is the log-probability that it was drawn with (before filters and
penalties). For a < b the steps are *merged*: their tokens are scored as if all had been written at once, a mean field
of the tokens in between (d2, arXiv 2509.21474; TraceRL's shrinkage, arXiv 2509.06949).

Steps are numbered per row, without gaps: 0 is the first that wrote something. Which of them are scored, and what they
count for, is a selector's business (`rl4dlm.likelihood.step_selectors`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, check_scope, in_scope
from rl4dlm.likelihood.views import Rows, Views

NO_STEP = 2**62
"""Where nothing was written: behind all steps."""


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

    def blocks(self, rows: Rows) -> Tensor | None:
        """The number `[B, L]` of the block whose steps a token's is counted among; None: they are the canvas's."""
        return None

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
        lowest = trail.step.masked_fill(~written, NO_STEP)
        start = torch.full_like(trail.step, NO_STEP).scatter_reduce(-1, group, lowest, "amin")
        end = torch.full_like(trail.step, -1).scatter_reduce(-1, group, trail.step, "amax")
        first = torch.where(there, start.gather(-1, place), 0)
        last = torch.where(there, end.gather(-1, place), -1)
        return Steps(first, last, torch.where(there, weight.gather(-1, place), 0.0))


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
    reads_record: ClassVar[bool] = True  # type: ignore[misc]
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
        """The steps that the views of `draw` are about, by their numbers in the record (`Rows.commit_step`).

        Raises:
            ValueError: views hold steps of several blocks, which have no one number.
        """
        if self.selector.blocks(rows) is not None:
            raise ValueError(f"{self.selector} puts steps of several blocks into a view: they have no one number")
        assert rows.commit_step is not None
        trail, steps = self._chosen(rows, seed, iteration)
        width = max(int(trail.step.max()) + 1 if trail.step.numel() else 0, 1)  # a selector may count idle steps
        number = trail.step.new_zeros(len(trail.step), width)
        number = number.scatter_reduce(-1, trail.step.clamp(min=0), rows.commit_step, "amax")
        there = steps.last >= steps.first
        first, last = (number.gather(-1, each.clamp(min=0)) for each in (steps.first, steps.last))
        return Steps(torch.where(there, first, 0), torch.where(there, last, -1), steps.weight)

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
        trail, blocks = self.selector.trail(rows, self.scope), self.selector.blocks(rows)
        # A view has a step of each block, and these are not one.
        first = torch.zeros_like(trail.group) if blocks is None else blocks * (trail.group.shape[1] + 1)
        scored = views.scored.any(1)
        unit = dense(first + views.scored.long().argmax(1), scored)  # each token is scored in one view at most
        if self.selector.partial:
            return Units(unit, scored.sum(-1), 1 + unit.amax(-1))
        return Units(unit, trail.counted.sum(-1), 1 + dense(first + trail.group, trail.counted).amax(-1))

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
    ordered, order = keys.masked_fill(~counted, NO_STEP).sort(dim=-1)
    rises = torch.zeros_like(ordered)
    rises[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    return torch.empty_like(keys).scatter(-1, order, rises.cumsum(-1)).masked_fill(~counted, -1)
