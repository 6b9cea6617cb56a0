"""The one place that builds attention masks and position ids, for rollout and likelihood alike.

Owns who sees whom, per attention kind and attention implementation. Does not own caches or block schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SUPPORTED_KINDS = ("full",)


def check_attention(spec: DiffusionSpec, implementation: str | None) -> None:
    """Raises ValueError for an attention kind that cannot be run yet, naming what can."""
    if spec.attention not in SUPPORTED_KINDS:
        raise ValueError(
            f"attention={spec.attention!r} is not supported by this version; supported: {', '.join(SUPPORTED_KINDS)}"
        )
    if implementation is not None and not implementation.startswith(("sdpa", "eager", "flex", "flash")):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported; choose sdpa, eager, flex_attention or a "
            "flash_attention variant"
        )


def position_ids(keys: Tensor) -> Tensor:
    """Positions that count from the first real token of each row.

    Args:
        keys: bool `[R, T]`, True for real tokens; padding is on the left.

    Returns:
        long `[R, T]`; padding gets 0.
    """
    return (keys.long().cumsum(-1) - 1).clamp(min=0)


def attention_mask(
    keys: Tensor, queries: int, implementation: str | None, dtype: torch.dtype
) -> Tensor | BlockMask | None:
    """The mask of bidirectional (`"full"`) attention: every query sees every real key.

    Args:
        keys: bool `[R, T]`, True for real tokens.
        queries: number of query positions Q; they may be fewer than T when keys and values are cached.
        implementation: the model's attention implementation; it decides the form of the mask.
        dtype: dtype of the model's activations, for implementations that add the mask to the scores.

    Returns:
        None when nothing is hidden; bool `[R, 1, Q, T]` for SDPA; the same as an additive float for eager attention
        (which would add a bool mask as 0 and 1, silently hiding nothing); a BlockMask for FlexAttention.

    Raises:
        ValueError: FlashAttention with padding, which needs another batch layout.
    """
    if bool(keys.all()):
        return None
    implementation = implementation or "sdpa"
    if implementation.startswith("flash"):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot hide padding here; use sdpa or flex_attention, or prompts "
            "of equal length"
        )
    if implementation.startswith("flex"):
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return keys[row, key]

        return create_block_mask(visible, len(keys), None, queries, keys.shape[1], device=str(keys.device))
    mask = keys[:, None, None, :].expand(-1, 1, queries, -1)  # [R, 1, Q, T]
    if implementation.startswith("eager"):
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask
