"""How the tensors of a published checkpoint are made of those of a stock model.

Owns the description (`Layout`) and the layouts that several families share; pure functions of names and shapes.
Reading and writing files is `checkpoint.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of every tensor of a stock model."""


class Part(NamedTuple):
    """Some rows of a stock tensor: `tensor[expert][start:stop]`, or `tensor[start:stop]` without an expert."""

    tensor: str
    start: int
    stop: int
    expert: int | None = None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the rows."""
        inner = shapes[self.tensor][self.expert is not None :]
        return (self.stop - self.start, *inner[1:])


Layout = dict[str, tuple[Part, ...]]
"""Name of a published tensor -> the parts it consists of, one after the other along its first dimension."""

EXPERTS_UP, EXPERTS_DOWN = "experts.gate_up_proj", "experts.down_proj"
"""Where stock mixture-of-experts classes keep all experts of a layer: `[E, 2 I, D]` (gate above up) and `[E, D, I]`."""


def whole(tensor: str, shapes: Shapes) -> Part:
    """All rows of a stock tensor."""
    return Part(tensor, 0, shapes[tensor][0])


def per_expert(shapes: Shapes) -> Layout:
    """Names as in the stock model, and one matrix per expert where the stock model holds all of a layer in one."""
    layout: Layout = {}
    for name, shape in shapes.items():
        if name.endswith(EXPERTS_UP):
            prefix, half = name.removesuffix("gate_up_proj"), shape[1] // 2
            for expert in range(shape[0]):
                layout[f"{prefix}{expert}.gate_proj.weight"] = (Part(name, 0, half, expert),)
                layout[f"{prefix}{expert}.up_proj.weight"] = (Part(name, half, shape[1], expert),)
        elif name.endswith(EXPERTS_DOWN):
            prefix = name.removesuffix("down_proj")
            for expert in range(shape[0]):
                layout[f"{prefix}{expert}.down_proj.weight"] = (Part(name, 0, shape[1], expert),)
        else:
            layout[name] = (whole(name, shapes),)
    return layout


def renamed(layout: Layout, rename: Callable[[str], str]) -> Layout:
    """The same layout under other published names."""
    return {rename(name): parts for name, parts in layout.items()}
