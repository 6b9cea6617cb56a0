"""Counts what decoding costs and no clock says: what is fed, operations and waits outside the trunk, tensors alive.

Owns the counters alone; benchmarks and tests say what they run under them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are made under it and alive at the same time; `peak` is the most there were.

    What was there before is left out, and so is what an operation allocates and frees inside of itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages((args, kwargs)):
            self._hold(storage, 0)  # it was there before, or is held already
        made = func(*args, **(kwargs or {}))
        for storage in self._storages(made):
            self._hold(storage, storage.nbytes())
        return made

    def _storages(self, tree: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _hold(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


@contextmanager
def forwards(trunk: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of every forward of `trunk`, padding included."""
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        shape = next(value for value in given if value is not None).shape
        seen.append((shape[0], shape[1]))

    hook = trunk.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
