"""The seam between the engine and its caches: what a policy sees of the rows, and what it says of the next forward.

A policy is a frozen dataclass whose fields are its settings (`DecodingConfig.cache_args`). It holds no state; what it
must remember of a row it keeps in `Now.memory`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.rollout.memory import Memory


@dataclass(frozen=True)
class Now:
    """Rows that are about to be fed. R rows of T columns: `width` of the left-padded prompt, then the canvas.

    Args:
        width: columns before the canvas. columns: T.
        block_step: long `[R]`, steps already made in the active block. total_step: long `[R]`, in all.
        block: long `[R]`, number of the active block, from 0.
        start, stop: long `[R]`, first column of the active block, which may lie in the prompt where the model's own
            attention has blocks, and the one behind its last, or behind that of the last block that is open.
        before: long `[R]`, `start` at the step before, -1 before the first: what was written since lies behind it.
        refreshed: long `[R]`, the block in which the row was last refreshed; -1: never.
        open: bool `[R, W]`, canvas slots that hold the mask token.
        tokens: long `[R, T]`, as they are to be fed.
        fed: long `[R, T]`, what each column held when it was last fed, -1 where it never was. Only there for policies
            that say `tracks`.
        upcoming: long `[R, W]`, canvas slots that the step will write, in their order from 0; -1 for all others. Only
            there for policies that say `foresees`.
        row_ids: long `[R]`.
        memory: of these rows, for the policy alone.
    """

    width: int
    columns: int
    block_step: Tensor
    total_step: Tensor
    block: Tensor
    start: Tensor
    stop: Tensor
    before: Tensor
    refreshed: Tensor
    open: Tensor
    tokens: Tensor
    fed: Tensor | None
    upcoming: Tensor | None
    row_ids: Tensor
    memory: Memory

    @cached_property
    def column(self) -> Tensor:
        """long `[T]`."""
        return torch.arange(self.columns, device=self.start.device)

    @cached_property
    def masked(self) -> Tensor:
        """bool `[R, T]`, columns that hold the mask token."""
        return torch.cat([self.open.new_zeros(len(self.open), self.width), self.open], dim=1)

    @cached_property
    def changed(self) -> Tensor:
        """bool `[R, T]`, columns that hold another token than when they were last fed, or were never fed."""
        assert self.fed is not None, "a policy that looks at what has changed says so: tracks = True"
        return self.fed != self.tokens

    def between(self, first: Tensor, stop: Tensor) -> Tensor:
        """bool `[R, T]`, columns from `first` to before `stop`, long `[R]` each."""
        return (self.column >= first[:, None]) & (self.column < stop[:, None])


@dataclass(frozen=True)
class Plan:
    """What the next forward feeds of each row.

    Everything that is fed is stored in place; a column that is not fed keeps the keys and values of its last time. The
    engine adds the column before each slot that is predicted where the model's logits are shifted.

    Args:
        first: long `[R]`, the first column. A negative number refreshes the row: all is fed that may have changed since
            it was stored, which is the whole row; but where attention is left to right, keys of blocks that were
            finished when they were last fed stay true, and it is everything from the block that was active before.
        last: long `[R]`, the column behind the last one; None: all that the active block can see.
        among: bool `[R, T]`, which of these columns are fed; None: all of them. A refresh does not look at it.
    """

    first: Tensor
    last: Tensor | None = None
    among: Tensor | None = None


@dataclass(frozen=True)
class CachePolicy(ABC):
    """Decides what a step feeds.

    Attributes:
        name: what `DecodingConfig.cache` calls it.
        exact_for: attention kinds for which logits equal those of a full forward.
        uses_store: whether keys and values are kept between steps.
        shares: rows that are refreshed and rows that are not are fed in one forward, the shorter ones padded. Good
            where both are of similar length.
        tracks: the policy looks at what has changed.
        foresees: the policy looks at what the next step will write, and candidates are drawn for these slots alone.
    """

    name: ClassVar[str]
    exact_for: ClassVar[frozenset[str]]
    uses_store: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    tracks: ClassVar[bool] = False
    foresees: ClassVar[bool] = False

    @abstractmethod
    def plan(self, now: Now) -> Plan:
        """What the next forward feeds."""

    @property
    def feeds_again(self) -> bool:
        """Whether what a step inside a block stores is fed again before anything depends on it: by the next step in the
        block, and where the next block is entered. Only then can steps be guessed and made beside each other."""
        return False

    def check(self, config: Any) -> None:  # noqa: B027  (most policies take any settings)
        """Raises ValueError for decoding settings (a `DecodingConfig`) that the policy cannot be used with."""


def refresh_due(now: Now, blocks: int | None, steps: int | None) -> Tensor:
    """bool `[R]`: rows never fed, those that enter a block `blocks` blocks after the one of their last refresh, and
    those that have made a multiple of `steps` steps in their block; None: never for that reason."""
    due = now.refreshed < 0
    if blocks is not None:
        due = due | ((now.block_step == 0) & (now.block - now.refreshed >= blocks))
    if steps is not None:
        due = due | ((now.block_step > 0) & (now.block_step % steps == 0))
    return due


def check_period(policy: object, *names: str, low: int = 1) -> None:
    """Raises ValueError unless each setting is None or an integer of at least `low`."""
    for name in names:
        value: Any = getattr(policy, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, {low} or larger, or None")


def check_count(policy: object, name: str, low: int) -> None:
    """Raises ValueError unless a setting is an integer of at least `low`."""
    value: Any = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, {low} or larger")


@dataclass(frozen=True)
class PeriodicPolicy(CachePolicy):
    """Refreshes when a block is entered, every block or every few, and in between feeds from some column on.

    Args:
        refresh_blocks: blocks from one refresh to the next; rows that enter a block in between feed from the block
            before it.
        refresh_steps: steps within a block from one refresh to the next, besides those at entry; None: none.

    Raises:
        ValueError: a setting that is no such number.
    """

    refresh_blocks: int = 1
    refresh_steps: int | None = None

    def __post_init__(self) -> None:
        check_period(self, "refresh_blocks", "refresh_steps")

    @property
    def feeds_again(self) -> bool:
        return self.refresh_steps is None

    def first(self, now: Now) -> Tensor:
        """The first column, long `[R]`; -1 for a refresh."""
        first = torch.where(now.block_step == 0, now.before, now.start)
        return first.masked_fill(refresh_due(now, self.refresh_blocks, self.refresh_steps), -1)


_policies: dict[str, type[CachePolicy]] = {}


def register(policy: type[CachePolicy]) -> type[CachePolicy]:
    """Makes a policy available under its name. Raises ValueError if the name is taken."""
    if policy.name in _policies or policy.name == "auto":
        raise ValueError(f"a cache policy named {policy.name!r} is registered already")
    _policies[policy.name] = policy
    return policy


def policies() -> dict[str, type[CachePolicy]]:
    """Names to policies."""
    return dict(_policies)
