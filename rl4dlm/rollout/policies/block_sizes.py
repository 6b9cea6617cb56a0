"""Policies that choose how long the next block is, for the schedule `ctrldiff` (CtrlDiff, arXiv 2505.14455).

Owns what such a policy is, a network that can be trained, and the density of its choices: a categorical distribution
over the sizes that are on offer. The paper's network, sizes and reward were not published in a form that could be
followed; those here are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rl4dlm.rollout.policies.policy import Seen, UnmaskingPolicy
from rl4dlm.rollout.policies.saving import register

FEATURES = ("confidence", "entropy", "open")
"""What a policy sees of each of the next slots: the probability of its candidate, its entropy in nats, and 1 where it
is open; all 0 where it is not."""


@runtime_checkable
class BlockSizePolicy(Protocol):
    """Chooses among block sizes.

    Attributes:
        sizes: the sizes, ascending.
    """

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities of the sizes, float `[R, K]`, from features of the next slots, `[R, max(sizes), 3]`.

        A row's result must not depend on the other rows.
        """
        ...


@dataclass(frozen=True)
class UniformSizes:
    """All sizes are equally likely; with a single one, blocks have a fixed length."""

    sizes: tuple[int, ...]

    def log_probs(self, features: Tensor) -> Tensor:
        return features.new_zeros(len(features), len(self.sizes)).log_softmax(-1)


@register
class LearnedSizes(UnmaskingPolicy):
    """A network of one hidden layer over the features of all slots; at first all sizes are equally likely.

    It is meant to run in float64, so that a row's result does not change with the rows beside it by more than what
    could never tip a draw.

    Args:
        sizes: block sizes to choose from. hidden: units of the hidden layer.
    """

    kind = "block_sizes"

    def __init__(self, sizes: tuple[int, ...], *, hidden: int = 32) -> None:
        super().__init__()
        self.sizes = checked_sizes(sizes)
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden={hidden!r} is not allowed; it must be an integer, 1 or larger")
        with torch.device("meta"):
            self.hidden = nn.Linear(max(self.sizes) * len(FEATURES), hidden, dtype=torch.float64)
            self.choice = nn.Linear(hidden, len(self.sizes), dtype=torch.float64)

    @property
    def settings(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "hidden": self.hidden.out_features}

    def initialise(self, generator: torch.Generator) -> None:
        """The second layer is 0."""
        self.hidden.weight.normal_(std=self.hidden.in_features**-0.5, generator=generator)
        for zeros in (self.hidden.bias, self.choice.weight, self.choice.bias):
            zeros.zero_()

    def log_probs(self, features: Tensor) -> Tensor:
        weights = self.hidden.weight
        inputs = features.to(weights.device, weights.dtype).flatten(1)
        found: Tensor = self.choice(torch.tanh(self.hidden(inputs))).log_softmax(-1)
        return found.to(features.device)

    def forward(self, seen: Seen) -> Tensor:
        """Log-probabilities of the sizes, `[R, K]`; of what is seen it reads the features, `[R, max(sizes), 3]`."""
        return self.log_probs(seen.features)


def offered(log_probs: Tensor, allowed: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[n, K]` of the sizes allowed, bool `[n, K]`, at a temperature above 0; -inf elsewhere."""
    return (log_probs.double() / temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1)


def checked_sizes(sizes: Any) -> tuple[int, ...]:
    """Sizes as an ascending tuple. Raises ValueError for what is not a list of different positive integers."""
    whole = isinstance(sizes, tuple | list) and all(isinstance(s, int) and not isinstance(s, bool) for s in sizes)
    good = whole and bool(sizes) and all(s >= 1 for s in sizes)
    if not good or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes={sizes!r} is not allowed; it must be a list of ascending integers, 1 or larger")
    return tuple(sizes)
