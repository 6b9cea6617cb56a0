"""What one forward feeds: which columns of which rows, beside them the shadow of a block, and what is scored of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl4dlm.models.attention import NOWHERE, Sight


@dataclass(frozen=True)
class Shadow:
    """The copy of the active block that is fed beside the row: S columns of mask tokens."""

    slots: Tensor  # long [R, S], canvas offsets
    real: Tensor  # bool [R, S], whether the block has so many slots
    scored: Tensor  # bool [R, S], slots whose held token is verified

    def sight(self, width: int, feed: int, copies: int) -> Sight:
        """Rows see rows; a shadow sees the row but the slot it stands for, and itself. Nothing else sees it."""
        slots = self.slots.repeat(copies, 1)
        rows = torch.zeros(len(slots), feed, dtype=torch.long, device=slots.device)
        return Sight(
            places=torch.cat([rows, torch.full_like(slots, NOWHERE)], 1),
            horizons=torch.cat([rows, torch.zeros_like(slots)], 1) + 1,
            blocks=torch.cat([rows - 1, slots], 1),
            hidden=torch.cat([rows - 1, slots + width], 1),
        )


@dataclass(frozen=True)
class Part:
    """What one forward feeds: q columns of r rows."""

    rows: Tensor | None  # long [r]; None: all, in order
    columns: slice | Tensor  # the same of all rows, or long [r, q]; columns that pad repeat the last one of their row
    real: Tensor | None = None  # bool [r, q], columns that do not pad; None: none does
    seen: int | None = None  # columns of the store that are attended to; None: what is fed sees itself
    shadow: Shadow | None = None

    def rows_of(self, value: Tensor) -> Tensor:
        """`value` `[R, ...]` of the rows."""
        return value if self.rows is None else value[self.rows]

    def of(self, value: Tensor) -> Tensor:
        """`value` `[R, T]` where it is fed, `[r, q]`."""
        value = self.rows_of(value)
        return value[:, self.columns] if isinstance(self.columns, slice) else value.gather(-1, self.columns)

    def index(self, like: Tensor) -> Tensor:
        """long `[r, q]`, the columns, for rows as many as those of `like` `[R, T]` or the chosen ones."""
        if isinstance(self.columns, Tensor):
            return self.columns
        column = torch.arange(self.columns.start, self.columns.stop, device=like.device)
        return column.expand(len(like if self.rows is None else self.rows), -1)

    def slots_of(self, wanted: Tensor, width: int) -> Tensor:
        """bool `[r, q]`, fed columns whose slot is wanted (bool `[R, W]`)."""
        wanted, size = self.rows_of(wanted), wanted.shape[1]
        if isinstance(self.columns, slice):
            begin, end = self.columns.start - width, self.columns.stop - width
            inside = wanted[:, max(begin, 0) : end]
            return torch.nn.functional.pad(inside, (max(-begin, 0), 0))
        slots = self.columns - width
        score = wanted.gather(-1, slots.clamp(min=0, max=size - 1)) & (slots >= 0)
        return score if self.real is None else score & self.real

    def scores(self, score: Tensor, feed: int, width: int) -> Scores:
        """Which slots the scored columns bool `[r, q]` stand for; those behind `feed` are the shadow's."""
        rows, columns = score.nonzero(as_tuple=True)
        beside = columns >= feed
        if isinstance(self.columns, slice):
            slots = columns + self.columns.start - width
        else:
            slots = self.columns[rows, columns] - width
        if self.shadow is not None:
            slots = torch.where(beside, self.shadow.slots[rows, (columns - feed).clamp(min=0)], slots)
        return Scores((rows, columns), rows if self.rows is None else self.rows[rows], slots, beside)


@dataclass(frozen=True)
class Scores:
    """Which slots the scored columns of a forward stand for, in row-major order."""

    at: tuple[Tensor, Tensor]  # long [n], row and column of the forward
    rows: Tensor  # long [n], among the rows alive
    slots: Tensor  # long [n], canvas offsets
    shadow: Tensor  # bool [n]


def chosen_columns(rows: Tensor | None, chosen: Tensor, seen: int) -> Part:
    """A forward of chosen columns, bool `[r, T]`; rows with fewer repeat their last one."""
    counts = chosen.sum(-1)
    order = (~chosen).long().argsort(dim=-1, stable=True)[:, : int(counts.max())]
    place = torch.arange(order.shape[1], device=order.device)
    columns = order.gather(-1, torch.minimum(place, counts[:, None] - 1))
    return Part(rows, columns, place < counts[:, None], seen)
