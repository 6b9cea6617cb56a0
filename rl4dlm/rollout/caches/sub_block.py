"""Fast-dLLM v2's sub-block cache (arXiv 2509.26328): a dual cache inside the block, for the schedule `sub_blocks`.

The first step of a block feeds it whole, and the finished block before it, whose keys are then final. After that the
block is fed whole until the first slot of its first unfinished sub-block is written, and the sub-block alone from then
on, against the stored keys and values of the rest of the block: finished sub-blocks as they were when the block was
last fed whole, and masked slots that saw less than is written now. As tokens of a block see one another the logits are
approximate, for every attention kind; with sub-blocks as long as the block nothing is left out and they are exact where
the block cache is.

Differences from the released code: rows of any number, in different blocks and sub-blocks; slots that were given (a
sub-block that begins with one is fed with its block when it is entered). A forward that stores a finished block is part
of the next block's first step. Recorded results of the released code are reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, register


@register
@dataclass(frozen=True)
class SubBlockCache(CachePolicy):
    """Feeds the block whole when a sub-block is entered, later the sub-block alone.

    Args:
        sub_block_length: of a sub-block, that of the schedule.

    Raises:
        ValueError: it is no such number.
    """

    sub_block_length: int = 8

    name: ClassVar[str] = "sub_block"
    exact_for: ClassVar[frozenset[str]] = frozenset()
    tracks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        length: Any = self.sub_block_length
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"sub_block_length={length!r} is not allowed; it must be an integer, 1 or larger")

    def check(self, config: Any) -> None:
        """Raises ValueError for another schedule than `sub_blocks`, or sub-blocks of another length."""
        if config.schedule != "sub_blocks":
            raise ValueError(
                f"cache='sub_block' cannot be used with schedule={config.schedule!r}, which does not write one "
                "sub-block after another; choose 'sub_blocks', or another cache"
            )
        length = config.arguments().sub_block_length
        if length != self.sub_block_length:
            raise ValueError(
                f"cache_args has sub_block_length={self.sub_block_length}, but schedule_args has {length}; they must "
                "be the same"
            )

    def plan(self, now: Now) -> Plan:
        length, block = self.sub_block_length, now.between(now.start, now.stop)
        first = (now.masked & block).long().argmax(-1)
        begin = now.start + (first - now.start).div(length, rounding_mode="floor") * length
        end = torch.minimum(begin + length, now.stop)
        inside = now.between(begin, end)

        def holds(column: torch.Tensor) -> torch.Tensor:
            return ~now.masked.gather(-1, column[:, None]).squeeze(-1)

        # The block holds its first token alone: it was fed whole without that, with the block before it.
        alone = holds(now.start) & (now.masked | ~now.between(now.start + 1, now.stop)).all(-1)
        whole = ~holds(begin) | alone | (now.changed & block & ~inside).any(-1)
        plan = torch.where(whole, now.start, begin).masked_fill(now.block_step == 0, -1)
        return Plan(plan, torch.where(whole, now.stop, end), torch.where(whole[:, None], block, inside))
