"""What is hidden from a row that is trained on, and what its hidden tokens count for.

Owns the mathematics of denoising training: levels, the share of hidden tokens by position, complementary masks and
weights. Where uniform numbers come from and how rows are scored is elsewhere.

A level t gives each token a probability p(t) of being hidden, with p(0) = 0 and p(1) = 1; p(t) = t as a rule. Over
t ~ U(0, 1), the cross-entropies of hidden tokens times p'(t)/p(t) are an upper bound of the negative log-likelihood
(MD4, arXiv 2406.04329, for rates that differ between tokens): with p(t) = t the weight is the known 1/t. A bound of its
own per block holds for levels drawn per block, given the finished blocks before it (arXiv 2503.09573).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rl4dlm.likelihood.views import Views
from rl4dlm.models.attention import block_starts, position_ids
from rl4dlm.models.spec import DiffusionSpec


class Places(NamedTuple):
    """Where tokens are in the block grid."""

    blocks: Tensor  # long [B, T], position at which a token's block starts
    relative: Tensor  # float64 [B, T], middle of the token's slot in its block of unit length, in (0, 1)


def places_of(spec: DiffusionSpec, keys: Tensor, prompt_lengths: Tensor | None) -> Places:
    """The places of real tokens (`keys`, bool `[B, T]`) in the grid of a spec with blocks; see `block_starts`."""
    assert spec.block_length is not None
    positions = position_ids(keys)
    blocks = block_starts(spec, positions, prompt_lengths)
    return Places(blocks, ((positions - blocks).double() + 0.5) / spec.block_length)


def hiding(level: Tensor, relative: Tensor | None = None, tilt: float = 0.0) -> tuple[Tensor, Tensor]:
    """How probable it is that tokens are hidden at a level, and how fast that rises with it.

    With a tilt, p = t + tilt * t * (1 - t) * (2 r - 1), where r is the token's relative place in its block: later
    tokens are hidden more often, as they are while a model decodes roughly from left to right. The mean of p over a
    block is exactly t, p stays in [0, 1], and rises with t. (Efficient-DLM, arXiv 2512.14067, has the idea; the form is
    ours, chosen for these properties.)

    Args:
        level: float64 `[B, T]` (or `[B, 1]`), t in (0, 1].
        relative: float64 `[B, T]`, r; needed where there is a tilt.
        tilt: in [0, 1]; 0: every token is hidden with probability t.

    Returns:
        p and dp/dt, shaped as the inputs broadcast.
    """
    if tilt == 0:
        return level, torch.ones_like(level)
    assert relative is not None
    lean = tilt * (2 * relative - 1)
    return level + lean * level * (1 - level), 1 + lean * (1 - 2 * level)


def denoising_views(
    uniform: Tensor,
    targets: Tensor,
    probability: Tensor,
    rate: Tensor,
    *,
    weighted: bool = True,
    complementary: bool = False,
) -> Views:
    """The views of rows that are trained on.

    Args:
        uniform: float64 `[B, T]` in (0, 1); a target is hidden where it is below its probability.
        targets: bool `[B, T]`.
        probability, rate: of `hiding`, `[B, T]` or `[B, 1]`.
        weighted: hidden tokens count p'/p; else they count 1.
        complementary: a second view hides exactly the targets that the first one shows, so that every target is scored
            once (Fast-dLLM v2, arXiv 2509.26328). Weighted, each view counts half, so that the expectation stays that
            of one view: the second one is a view at level 1 - t.

    Returns:
        Views with K = 1 or 2, weights `[B, K, T]` in float32.
    """
    hidden = (uniform < probability) & targets
    if not complementary:
        weight = hidden * rate / probability if weighted else hidden
        return Views(hidden[:, None], weight.float()[:, None])
    other = targets & ~hidden
    both = torch.stack([hidden, other], dim=1)  # [B, 2, T]
    if not weighted:
        return Views(both, both.float())
    half = 0.5 * torch.stack([hidden * rate / probability, other * rate / (1 - probability)], dim=1)
    return Views(both, half.float())
