"""WeDLM's sliding window (Liu et al., arXiv 2512.22737): a window of masked slots that moves on with what is written.

The window has the first masked slot and those up to `window` slots behind it. Every step writes its candidates of low
entropy, where a penalty per slot of distance from the first masked one is added to the entropy, and always the one for
which the sum is lowest. There are no blocks: as soon as the first slots of the window are written it moves.

With `attention="written_first"`, for which WeDLM is trained, a model sees what is written before what is masked, and
the keys of everything up to the first masked slot are final once it was fed; the `prefix` cache then feeds what has
been written there since the step before, and the window, and loses nothing.

Differences from the released code: the prompt is read in the first step, together with the window (there in a forward
of its own), and the last tokens are not fed; the window ends with the canvas (there it goes on behind the limit, and
tokens that are written there are seen, then dropped); slots that were given; the mask token is no candidate. Recorded
results of the released code are reproduced with a canvas that is a window longer. `stop_at_eos="block"` never stops
before the canvas is full, as there is always something open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rl4dlm.rollout.schedules.adablock import refuse_block_length
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.parts import BlockState, FixedBlocks, Schedule, Step
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class SlidingWindowArguments:
    """Settings of `sliding_window`.

    Args:
        window: slots from the first masked one on that may be written.
        entropy_threshold: candidates whose entropy in nats, with the penalty, is below it are committed.
        distance_penalty: added to the entropy for every slot of distance from the first masked one.
    """

    window: int = 16
    entropy_threshold: float = 0.4
    distance_penalty: float = 0.02

    def __post_init__(self) -> None:
        check_count(self, "window", 1)
        check_number(self, "entropy_threshold", 0)
        check_number(self, "distance_penalty", 0)


@register("sliding_window", SlidingWindowArguments, takes_steps=False)
def sliding_window(arguments: SlidingWindowArguments, config: Any) -> Schedule:
    """Commits what has little entropy near the first masked slot."""
    refuse_block_length(config, "window")

    def reach(rows: BlockState) -> Tensor:
        return _first(rows.masked) + arguments.window

    def certainty(step: Step) -> Tensor:
        distance = step.offsets - _first(step.masked)[:, None]
        return -(step.drawn.entropy + arguments.distance_penalty * distance)

    def commit(step: Step, scores: Tensor) -> Tensor:
        return scores > -arguments.entropy_threshold

    # Each slot is a block of its own, so that the active one is the first masked slot; writing runs ahead of it.
    blocks = FixedBlocks(1, on_grid=False)
    return Schedule(blocks, certainty, commit, reach=reach, ahead=True, reads_entropy=True)


def _first(masked: Tensor) -> Tensor:
    """The first masked slot of each row: long `[R]` from bool `[R, W]`."""
    return masked.long().argmax(-1)
