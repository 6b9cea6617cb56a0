"""dKV-Cache (Ma et al., arXiv 2505.15781): keys and values of written tokens are kept, one step late.

A token's representation jumps when its slot changes from the mask token, so its keys are stored a step later, when it
is fed as itself for the first time.

`dkv_decode` feeds what is masked, later blocks included, and what was written in the step before; every `refresh_steps`
steps of a block a forward is full. Positions fed at a step are S less the tokens that were known before the last step.
With `keep_prompt` such forwards leave the prompt out (the authors' "PD"). `dkv_prefill` feeds the prompt once, and the
canvas at every step. `dkv_greedy` also leaves masked slots to the store: a step feeds the slots that it will write,
those written in the step before, and the `window` masked slots nearest to each of the former. It needs an order that
is known before the forward, as that of `random` and `left_to_right` is.

All are approximate: what is kept knows nothing of what is written later. `dkv_prefill` alone is exact where attention
is left to right; there tokens of a block see one another, so that what the others keep of the block is stale.

Differences from the released code: rows may have written different numbers of tokens; keys are stored rotated and in
place (there three copies of everything per layer and step); the first forward of a block stores what it computed (for
LLaDA there it does not, and the second one is full too, as `full_steps=2` makes it; for Dream not). The order of
`dkv_greedy` is drawn at every step instead of once per block, which is the same order. Where logits are shifted, a row
whose own token is written is kept and fed again while it predicts an open slot; there a row is kept once the token that
it predicts is written, its own or not ("un"), or once both are ("un_right").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, check_count, check_period, register


@register
@dataclass(frozen=True)
class DKVDecodeCache(CachePolicy):
    """Feeds what is masked and what was just written.

    Args:
        refresh_steps: steps within a block from one full forward to the next; None: only at entry.
        full_steps: full forwards at the start of a block.
        keep_prompt: full forwards after the first one leave the prompt out.

    Raises:
        ValueError: a setting that is no such number.
    """

    refresh_steps: int | None = 8
    full_steps: int = 1
    keep_prompt: bool = False

    name: ClassVar[str] = "dkv_decode"
    exact_for: ClassVar[frozenset[str]] = frozenset()
    tracks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_period(self, "refresh_steps")
        check_count(self, "full_steps", 1)
        if not isinstance(self.keep_prompt, bool):
            raise ValueError(f"keep_prompt={self.keep_prompt!r} is not allowed; choose True or False")

    def plan(self, now: Now) -> Plan:
        full = now.block_step < self.full_steps
        if self.refresh_steps is not None:
            full = full | (now.block_step % self.refresh_steps == 0)
        whole = now.refreshed < 0 if self.keep_prompt else full
        first = torch.full_like(now.start, now.width if self.keep_prompt else 0)
        return Plan(first.masked_fill(whole, -1), among=now.masked | now.changed | full[:, None])


@register
@dataclass(frozen=True)
class DKVPrefillCache(CachePolicy):
    """Feeds the prompt once."""

    name: ClassVar[str] = "dkv_prefill"
    exact_for: ClassVar[frozenset[str]] = frozenset(LEFT_TO_RIGHT)

    def plan(self, now: Now) -> Plan:
        # A block of the model's attention may begin in the prompt, whose tokens in it see what is written there.
        block = torch.where(now.block_step == 0, now.before, now.start)
        return Plan(block.clamp(max=now.width).masked_fill(now.refreshed < 0, -1))


@register
@dataclass(frozen=True)
class DKVGreedyCache(CachePolicy):
    """Feeds what is about to be written, what was just written, and some masked slots near the former.

    Args:
        window: masked slots that are fed per slot that is about to be written, the nearest ones, the left one among
            equals, other than those that are fed already.
        refresh_steps: steps within a block from one full forward to the next.

    Raises:
        ValueError: a setting that is no such number, or a schedule whose order is not known before its forwards.
    """

    window: int = 4
    refresh_steps: int = 2

    name: ClassVar[str] = "dkv_greedy"
    exact_for: ClassVar[frozenset[str]] = frozenset()
    tracks: ClassVar[bool] = True
    foresees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self, "window", 0)
        check_count(self, "refresh_steps", 1)

    def check(self, config: Any) -> None:
        if getattr(config.build_schedule(), "upcoming", None) is None:
            raise ValueError(
                f"cache={self.name!r} cannot be used with schedule={config.schedule!r}, whose next slots are not known "
                "before a forward; allowed: 'random' and 'left_to_right'"
            )
        if config.defer_token_ids:
            raise ValueError(
                f"cache={self.name!r} cannot be used with defer_token_ids={config.defer_token_ids!r}, which changes "
                "the order once candidates are known; leave it empty"
            )

    def plan(self, now: Now) -> Plan:
        assert now.upcoming is not None
        place = torch.nn.functional.pad(now.upcoming, (now.width, 0), value=-1)  # [R, T]
        fed = (place >= 0) | now.changed
        for number in range(int(place.max()) + 1 if self.window else 0):
            fed = fed | self._near(place == number, now.masked & ~fed, now.column)
        full = (now.refreshed < 0) | (now.block_step % self.refresh_steps == 0)
        return Plan(torch.zeros_like(now.start).masked_fill(full, -1), among=fed)

    def _near(self, slot: Tensor, free: Tensor, column: Tensor) -> Tensor:
        """bool `[R, T]`: the free columns nearest to the one of each row that `slot` marks, if there is one."""
        at = slot.long().argmax(-1, keepdim=True)
        away = column - at
        order = 2 * away.abs() + (away > 0).long()
        far = 2 * len(column) + 2
        order = torch.where(free & slot.any(-1, keepdim=True), order, far)
        count = min(self.window, len(column))
        nearest = order.topk(count, dim=-1, largest=False)
        return torch.zeros_like(free).scatter(-1, nearest.indices, nearest.values < far)
