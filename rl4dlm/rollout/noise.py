"""Randomness as a pure function of keys, so that nothing depends on batch composition, order or device.

Owns the counter-based generator and the `NoiseSource` that decoding draws from. There is no state and no seed to set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def keyed_uniform(seed: int, purpose: str, *keys: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), one per entry of the broadcast keys, equal on every device and in every batch.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for; streams of different purposes are independent.
        keys: long tensors that broadcast against each other, such as row id, step and position.

    Returns:
        float64 tensor of the broadcast shape with 53 random bits per entry (SplitMix64 finaliser, keys absorbed one by
        one).
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    state: Tensor | int = _signed(int.from_bytes(digest, "little"))
    for key in torch.broadcast_tensors(*keys):
        state = _finalise(_finalise(key + _signed(_GAMMA)) ^ state)
    assert isinstance(state, Tensor), "keyed_uniform needs at least one key"
    return (_shift(state, 11).double() + 0.5) * 2.0**-53


class NoiseSource(Protocol):
    """Where decoding takes its randomness from; tests replay recorded noise through it.

    `rows` are row ids, `steps` each row's own step index and `positions` canvas offsets: long tensors `[n]`.
    """

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        """Uniform numbers in (0, 1), float64 `[n]`."""
        ...

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        """One token id per row of `probabilities` `[n, V]` (they need not sum to one), long `[n]`."""
        ...


@dataclass(frozen=True)
class KeyedNoise:
    """The noise of production: one keyed uniform per (row, step, position), and an inverse-CDF draw from it."""

    seed: int

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        return keyed_uniform(self.seed, purpose, rows, steps, positions)

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        return inverse_cdf(probabilities, self.uniform("token", rows, steps, positions))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draws by inverting the cumulative distribution; an entry of probability 0 is never drawn.

    Args:
        probabilities: `[n, V]`, non-negative; rows need not be normalised.
        uniforms: float64 `[n]` in (0, 1).

    Returns:
        long `[n]`. The sums run in float64: in float32 the tail of a large vocabulary would be lost. Where
        probabilities are not numbers it is any id, so that the caller can say so.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(value: Tensor) -> Tensor:
    for bits, factor in _MIX:
        value = (value ^ _shift(value, bits)) * _signed(factor)
    return value ^ _shift(value, 31)
