"""Randomness as a pure function of keys, so that nothing depends on batch composition, order or device.

Owns the counter-based generator and the `NoiseSource` that decoding draws from. There is no state and no seed to set.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 256
"""Entries of a vocabulary that are summed up, or compared, before anything is looked at one by one."""

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
    return _absorbed(seed, purpose, *(_finalise(key + _signed(_GAMMA)) for key in torch.broadcast_tensors(*keys)))


def _absorbed(seed: int, purpose: str, *mixed: Tensor) -> Tensor:
    """The uniform numbers of keys that are mixed already, one after another."""
    state: Tensor | int = _start(seed, purpose)
    for key in mixed:
        state = _finalise(key ^ state)
    assert isinstance(state, Tensor), "keyed_uniform needs at least one key"
    return (_shift(state, 11).double() + 0.5) * 2.0**-53


def _start(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


@functools.lru_cache(maxsize=8)
def _mixed_numbers(limit: int, device: torch.device) -> Tensor:
    """long `[limit]`, what is made of each number before it is absorbed."""
    return _finalise(torch.arange(limit, device=device) + _signed(_GAMMA))


def mixed_ids(purpose: str, *keys: Tensor) -> Tensor:
    """One integer from 0 to 2^63 - 1 per entry of the broadcast keys, long; different keys give different ones, but for
    collisions of 63 random bits."""
    state: Tensor | int = _start(0, purpose)
    for key in torch.broadcast_tensors(*keys):
        state = _finalise(_finalise(key + _signed(_GAMMA)) ^ state)
    assert isinstance(state, Tensor), "mixed_ids needs at least one key"
    return _shift(state, 1)


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
    """The noise of production: one keyed uniform per (row, step, position), and an inverse-CDF draw from it.

    Args:
        seed: of the run.
        limit: steps and positions are below this; what is made of each such number is then looked up. 0: they may be
            any. The numbers drawn are the same.
    """

    seed: int
    limit: int = 0

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        if not self.limit:
            return keyed_uniform(self.seed, purpose, rows, steps, positions)
        mixed = _mixed_numbers(self.limit, rows.device)
        return _absorbed(self.seed, purpose, _finalise(rows + _signed(_GAMMA)), mixed[steps], mixed[positions])

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        return inverse_cdf(probabilities, self.uniform("token", rows, steps, positions))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draws by inverting the cumulative distribution; an entry of probability 0 is never drawn.

    Args:
        probabilities: `[n, V]`, non-negative; rows need not be normalised.
        uniforms: float64 `[n]` in (0, 1).

    Returns:
        long `[n]`: the first id whose cumulative probability exceeds `uniforms` times the total. The sums run in
        float64: in float32 the tail of a large vocabulary would be lost. Where probabilities are not numbers, or all 0,
        it is any id, so that the caller can say so.

    Sums are taken per block of `BLOCK` entries, and inside the one block that the draw falls into. A running sum over
    all entries would draw the same but where a uniform number is within its rounding, V 2^-52, of a boundary.
    """
    size = probabilities.shape[-1]
    if size <= BLOCK:
        cumulative = probabilities.double().cumsum(-1)
        return _first_above(cumulative, _below(uniforms[:, None] * cumulative[:, -1:], cumulative)).squeeze(-1)
    cumulative = per_block(probabilities, lambda part: part.sum(-1, dtype=torch.float64)).cumsum(-1)  # [n, V / BLOCK]
    threshold = _below(uniforms[:, None] * cumulative[:, -1:], cumulative)
    block = _first_above(cumulative, threshold)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(-1, columns.clamp(max=size - 1)).double().masked_fill(columns >= size, 0.0).cumsum(-1)
    token = block * BLOCK + _first_above(inside, _below(threshold - before, inside))
    return token.squeeze(-1).clamp(max=size - 1)


def per_block(values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`[..., ceil(V / BLOCK)]`: what a reduction over the last dimension makes of each block of values `[..., V]`."""
    whole = values.shape[-1] // BLOCK * BLOCK
    parts = [reduce(values[..., :whole].unflatten(-1, (-1, BLOCK)))]
    if whole < values.shape[-1]:
        parts.append(reduce(values[..., None, whole:]))
    return torch.cat(parts, dim=-1)


def _below(threshold: Tensor, cumulative: Tensor) -> Tensor:
    """Thresholds `[n, 1]` below the last of cumulative sums `[n, k]`, so that rounding leads behind none of them."""
    last = cumulative[:, -1:]
    return torch.minimum(threshold, torch.nextafter(last, torch.zeros_like(last)))


def _first_above(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """long `[n, 1]`, where cumulative sums `[n, k]` first exceed a threshold `[n, 1]`; the last if they never do."""
    return torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[-1] - 1)


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
