"""Counts what a decoding step costs besides the trunk: operations, and waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SIZED_BY_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "_local_scalar_dense", "is_nonzero", "equal")
_VIEWS = ("view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias",
          "_unsafe_view", "as_strided", "unbind", "split", "lift_fresh", "diagonal")  # fmt: skip


class Costs(TorchDispatchMode):
    """Operations by name, and those whose result the host must wait for.

    Views launch nothing and are left out. Boolean indices wait for a count; `tolist` waits for numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].rstrip("_") if func._schema.name.startswith("aten::") else func.__name__
        if not self.inside:
            if name not in _VIEWS:
                self.operations[name] += 1
            indexed = name in ("index", "index_put", "_index_put_impl") and any(
                isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
            )
            if indexed or func._schema.name.split("::")[1] in _SIZED_BY_DATA:
                self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def costs(trunk: torch.nn.Module) -> Iterator[Costs]:
    """Counts what is done outside the forward of `trunk`."""
    counted, body, listed = Costs(), trunk.forward, Tensor.tolist

    def forward(*args: Any, **kwargs: Any) -> Any:
        counted.inside += 1
        try:
            return body(*args, **kwargs)
        finally:
            counted.inside -= 1

    def tolist(self: Tensor) -> Any:
        counted.waits["tolist"] += 1
        return listed(self)

    trunk.forward, Tensor.tolist = forward, tolist  # type: ignore[method-assign]
    try:
        with counted:
            yield counted
    finally:
        del trunk.forward
        Tensor.tolist = listed  # type: ignore[method-assign]
