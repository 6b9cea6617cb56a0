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
        feeds_again: whether a step inside a block feeds all that the block's step before fed, so that nothing depends
            on what that one stored; steps can then be guessed and made beside each other.
    """

    name: ClassVar[str]
    uses_store: ClassVar[bool]
    exact_for: ClassVar[frozenset[str]]
    feeds_again: ClassVar[bool] = False

    @abstractmethod
    def feed_from(self, step: Tensor, block_start: Tensor) -> Tensor:
        """The first column that a step feeds, per row; everything from there on that the active block can see is fed.

        Args:
            step: long `[R]`, steps already made in the active block.
            block_start: long `[R]`, column of prompt and canvas at which the active block starts.

        Returns:
            long `[R]`; a negative number feeds all that may have changed since it was stored. That is the whole row,
            prompt included; but where attention is left to right, keys of blocks that were finished when they were last
            fed stay true, and it is everything from the block that was active before.
        """
