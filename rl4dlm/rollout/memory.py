"""What the parts of a schedule remember of each row between steps. The engine keeps it in step with the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Memory:
    """Tensors under names that parts choose; a part that finds none under its name has not run yet.

    Rows leave when they are finished, and slots move when others are put in before them; parts need not care.

    Args:
        rows: tensors `[R, ...]`, something per row.
        slots: tensors `[R, W, ...]`, something per slot of the canvas. Slots that are put in hold 0 (False).
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, rows: Tensor) -> None:
        """Keeps the rows of these indices, long `[r]`."""
        for store in (self.rows, self.slots):
            for name, value in store.items():
                store[name] = value[rows]

    def move(self, source: Tensor) -> None:
        """Gives slot j what slot `source[j]` held, long `[R, W']`; -1 for nothing."""
        for name, value in self.slots.items():
            self.slots[name] = moved(value, source, 0)


def moved(value: Tensor, source: Tensor, blank: float | int | bool) -> Tensor:
    """`value` `[R, W, ...]` at slots `source` long `[R, W']`, `blank` where that is -1."""
    index = source.clamp(min=0).view(*source.shape, *[1] * (value.dim() - 2)).expand(*source.shape, *value.shape[2:])
    absent = (source < 0).view(*source.shape, *[1] * (value.dim() - 2))
    return value.gather(1, index).masked_fill(absent, blank)
