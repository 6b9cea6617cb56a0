"""Queries, keys and values of chosen layers, as a forward computes them.

Owns how they are had from a stock model whatever its projections, norms and rotations are: the attention function that
its layers look up by name is replaced for the time of a forward by one that keeps what it is given and calls the
original. Nothing is computed besides, so that activation checkpointing recomputes exactly what it ran.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Recorded(NamedTuple):
    """What a layer's attention was given, with gradients."""

    query: Tensor  # [R, H, T, D], rotated
    key: Tensor  # [R, G, T, D], rotated; each of G heads is shared by H / G queries
    value: Tensor  # [R, G, T, V]
    scaling: float  # of the products of queries and keys


def check_layers(model: Any, layers: Sequence[int], name: str = "layers") -> None:
    """Raises ValueError unless a model (not wrapped) has attention in layers of these numbers, from 0 on."""
    found = getattr(model.base_model, "layers", ())
    if not all(hasattr(layer, "self_attn") for layer in found) or not len(found):
        raise ValueError(f"{type(model).__name__} has no decoder layers with attention to record")
    wrong = [layer for layer in layers if not 0 <= layer < len(found)]
    if wrong:
        raise ValueError(f"{name}={list(layers)}: the model has no layer {wrong[0]}; they are 0 to {len(found) - 1}")


@contextmanager
def recorded_attention(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Recorded]]:
    """Fills a dictionary with the attention of layers while the model runs forward inside; one forward at a time.

    Args:
        model: a stock model, not wrapped; it may be run by way of what wraps it.
        layers: their numbers, see `check_layers`.

    Raises:
        ValueError: no such layer, or some were not run in a way that could be recorded (a compiled model).
    """
    check_layers(model, layers)
    number: dict[nn.Module, int] = {model.base_model.layers[layer].self_attn: layer for layer in layers}
    name = model.config._attn_implementation or "sdpa"
    original = ALL_ATTENTION_FUNCTIONS.get(name)  # None for eager, which each module has of its own
    found: dict[int, Recorded] = {}

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in number:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            found[number[module]] = Recorded(query, key, value, scaling)
        run = original or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return run(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if original is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not original:
            ALL_ATTENTION_FUNCTIONS[name] = original  # it had been set in the same place
    missing = sorted({*layers} - found.keys())
    if missing:
        raise ValueError(f"the attention of layers {missing} was not recorded; is the model compiled?")
