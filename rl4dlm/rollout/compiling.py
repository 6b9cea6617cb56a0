"""How the machine runs a model's forwards while it decodes: compiled or not, and with what memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rl4dlm.models.adapters import base_model


def check_backend(name: str, value: str | None) -> None:
    """Raises ValueError for a setting that is neither None nor a backend of `torch.compile`."""
    if value is not None and value not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(sorted(torch.compiler.list_backends()))
        raise ValueError(f"{name}={value!r} is no backend of torch.compile here; choose one of {known}, or None")


@functools.cache
def keep_freed_memory() -> None:
    """On a CPU, makes the allocator keep activations that are freed, once per process.

    glibc returns blocks to the system that are larger than the largest one freed so far (up to 32 MiB), and pays for
    every page when it gets them again, at every operation of every forward: a quarter of a small model's rollout. Where
    the allocator is another one, or is told what to do, this does nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@contextmanager
def compiled(model: Any, backend: str | None) -> Iterator[None]:
    """The model's trunk is compiled inside; what is compiled is kept by torch for the next time."""
    if backend is None:
        yield
        return
    base = base_model(model)
    trunk = base.base_model
    own = trunk.__dict__.get("forward")
    trunk.forward = torch.compile(trunk.forward, backend=backend)
    try:
        yield
    finally:
        if own is None:
            del trunk.forward
        else:
            trunk.forward = own
