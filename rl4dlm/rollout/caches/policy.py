"""The seam between the engine and its caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class CachePolicy(ABC):
    """Decides what a step feeds.

    Attributes:
        name: what `DecodingConfig.cache` calls it.
        uses_store: whether keys and values are kept between steps.
        exact_for: attention kinds for which logits equal those of a full forward.
    """

    name: ClassVar[str]
    uses_store: ClassVar[bool]
    exact_for: ClassVar[frozenset[str]]

    @abstractmethod
    def feed_from(self, step: Tensor, block_start: Tensor) -> Tensor:
        """The first canvas offset that a step feeds, per row; everything from there to the end of the canvas is fed.

        Args:
            step: long `[R]`, steps already made in the active block.
            block_start: long `[R]`, canvas offset at which the active block starts.

        Returns:
            long `[R]`; a negative number feeds the whole row, prompt included, which refreshes the store.
        """
