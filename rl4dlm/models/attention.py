"""The one place that builds attention masks and position ids, for rollout and likelihood alike.

Owns who sees whom, per attention kind and attention implementation: in one copy of a sequence, as decoding sees it, and
in a noisy copy beside a clean one, which gives the denoising logits of all blocks in one forward (block diffusion,
arXiv 2503.09573). Does not own caches or block schedules.

Positions count from the first real token. A grid of blocks of `block_length` tokens starts at position zero, where a
prompt that does not end on it shares a block with the first tokens of the canvas, or at the response, from where it is
continued to the left through the prompt, or before which the whole prompt is one block. A token sees

- `full`: every token;
- `block_causal`: its own block and those before it;
- `context_causal`: in the block that is being denoised, as in `block_causal`; before it, itself and what precedes it;
- `causal`: itself and what precedes it;
- `written_first`: itself and what precedes it when masked tokens stand behind written ones, each in the order of their
  positions: a masked token sees all that is written, wherever it is, and the masked ones before it; a written token
  sees the written ones before it. It is what causal attention gives when the tokens are fed in that order with the
  positions that they have (WeDLM's reordered window, arXiv 2512.22737).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_KINDS = ("block_causal", "context_causal")
"""Kinds that denoise one block after another: a block is predicted from finished blocks, never from noisy ones."""

LEFT_TO_RIGHT = (*BLOCK_KINDS, "causal", "written_first")
"""Kinds in which a finished part of the sequence never sees what follows it, and masked tokens none behind them."""

BEHIND = 2**40
"""What masked tokens stand behind written ones by, where these come first."""

NOWHERE = 2**62
"""Place of keys that no horizon reaches."""


def check_attention(spec: DiffusionSpec, implementation: str | None) -> None:
    """Raises ValueError for an attention kind that an implementation cannot run, or that lacks its block length."""
    if implementation is not None and not implementation.startswith(("sdpa", "eager", "flex", "flash")):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported; choose sdpa, eager, flex_attention or a "
            "flash_attention variant"
        )
    if spec.attention != "full" and (implementation or "sdpa").startswith("flash"):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot run attention={spec.attention!r}, which needs a mask; use "
            "sdpa, eager or flex_attention"
        )
    if spec.attention in BLOCK_KINDS and spec.block_length is None:
        raise ValueError(
            f"attention={spec.attention!r} needs the length of its blocks, but the spec has block_length=None; set it "
            "to the one the model was trained with"
        )


def position_ids(keys: Tensor) -> Tensor:
    """Positions that count from the first real token of each row.

    Args:
        keys: bool `[R, T]`, True for real tokens.

    Returns:
        long `[R, T]`; padding on the left gets 0, on the right the position of the last real token.
    """
    return (keys.long().cumsum(-1) - 1).clamp(min=0)


class Sight(NamedTuple):
    """Who sees whom: a query sees the keys placed before its horizon, and the noisy ones of its own block, but never
    the one that is hidden from it."""

    places: Tensor  # long [R, S], of keys; NOWHERE for those of a noisy copy
    horizons: Tensor  # long [R, Q], of queries
    blocks: Tensor | None = None  # long [R, S], start of a noisy token's block, NOWHERE for clean ones; then Q = S
    hidden: Tensor | None = None  # long [R, Q], the one key that a query does not see, by its index; -1 for none
    unseen: Tensor | None = None  # bool [R, Q, S], keys that a query does not see besides

    def at(self, queries: Tensor, keys: Tensor | None = None) -> Sight:
        """For some columns (long `[R, q]`) as queries only, and if given for some (long `[R, s]`) as keys only."""
        assert self.blocks is None and self.hidden is None and self.unseen is None
        places = self.places if keys is None else self.places.gather(-1, keys)
        return Sight(places, self.horizons.gather(-1, queries))


def block_starts(spec: DiffusionSpec, positions: Tensor, prompt_lengths: Tensor | None) -> Tensor:
    """The position at which each token's block starts; negative in a prompt whose first block is not whole.

    Args:
        spec: of a kind that has blocks.
        positions: long `[R, T]`.
        prompt_lengths: long `[R]`, real tokens before the response; needed where the grid starts there.

    Returns:
        long `[R, T]`.

    Raises:
        ValueError: the grid starts at the response and it is not said where that is.
    """
    assert spec.block_length is not None
    if spec.grid_origin == "position_zero":
        return positions.div(spec.block_length, rounding_mode="floor") * spec.block_length
    if prompt_lengths is None:
        raise ValueError(
            f"the block grid starts at the response (grid_origin={spec.grid_origin!r}): prompt_lengths are needed"
        )
    origin = prompt_lengths[:, None]
    starts = (positions - origin).div(spec.block_length, rounding_mode="floor") * spec.block_length + origin
    return torch.where(starts < origin, 0, starts) if spec.grid_origin == "whole_prompt" else starts


def _block_ends(spec: DiffusionSpec, starts: Tensor, prompt_lengths: Tensor | None) -> Tensor:
    """The position behind the last one of blocks, from where they start: long `[R, T]`."""
    assert spec.block_length is not None
    ends = starts + spec.block_length
    if spec.grid_origin != "whole_prompt":
        return ends
    assert prompt_lengths is not None
    origin = prompt_lengths[:, None]
    return torch.where(starts < origin, origin, ends)


def one_copy(
    spec: DiffusionSpec,
    positions: Tensor,
    prompt_lengths: Tensor | None = None,
    active: Tensor | None = None,
    masked: Tensor | None = None,
) -> Sight | None:
    """Who sees whom while decoding; None where every token sees every token.

    Args:
        spec: of the model.
        positions: long `[R, T]`.
        prompt_lengths: long `[R]`, real tokens before the response; needed where the grid starts there.
        active: long `[R]`, position at which the block that is being denoised starts; needed by `context_causal`.
        masked: bool `[R, T]`, tokens that are the mask token; needed by `written_first`.

    Raises:
        ValueError: something that is needed is missing.
    """
    if spec.attention == "full":
        return None
    if spec.attention == "written_first":
        if masked is None:
            raise ValueError("attention='written_first' needs to know which tokens are masked")
        places = positions + masked * BEHIND
        return Sight(places, places + 1)
    if spec.attention == "causal":
        return Sight(positions, positions + 1)
    ends = _block_ends(spec, block_starts(spec, positions, prompt_lengths), prompt_lengths)
    if spec.attention == "block_causal":
        return Sight(positions, ends)
    if active is None:
        raise ValueError("attention='context_causal' needs to know which block is being denoised, or a clean copy")
    return Sight(positions, torch.where(positions < active[:, None], positions + 1, ends))


def two_copies(spec: DiffusionSpec, positions: Tensor, prompt_lengths: Tensor | None, first: int) -> Sight:
    """Who sees whom in a noisy copy followed by a clean one, both with the positions of the sequence.

    A noisy token sees the noisy tokens of its own block and the clean ones of the blocks before. A clean token sees
    clean ones alone: those of its own block and before (`block_causal`), or those up to itself (`context_causal`).

    Args:
        spec: of a kind in `BLOCK_KINDS`.
        positions: long `[R, T]`.
        prompt_lengths: long `[R]`, real tokens before the response; needed where the grid starts there.
        first: the noisy copy has the columns from this one on, the clean copy all of them.
    """
    starts = block_starts(spec, positions, prompt_lengths)  # [R, T]
    clean = positions + 1 if spec.attention == "context_causal" else _block_ends(spec, starts, prompt_lengths)
    nowhere = torch.full_like(starts, NOWHERE)
    return Sight(
        places=torch.cat([nowhere[:, first:], positions], dim=1),
        horizons=torch.cat([starts[:, first:], clean], dim=1),
        blocks=torch.cat([starts[:, first:], nowhere], dim=1),
    )


def attention_mask(
    keys: Tensor, queries: int, implementation: str | None, dtype: torch.dtype, sight: Sight | None = None
) -> Tensor | BlockMask | None:
    """The mask in the form that an attention implementation understands.

    Args:
        keys: bool `[R, S]`, True for real tokens.
        queries: number of query positions Q; they may be fewer than S when keys and values are cached.
        implementation: the model's attention implementation; it decides the form of the mask.
        dtype: dtype of the model's activations, for implementations that add the mask to the scores.
        sight: which of the real keys each query sees; None: all of them.

    Returns:
        None when nothing is hidden; bool `[R, 1, Q, S]` for SDPA; the same as an additive float for eager attention
        (which would add a bool mask as 0 and 1, silently hiding nothing); a BlockMask for FlexAttention.

    Raises:
        ValueError: FlashAttention with something to hide, which needs another batch layout.
    """
    if sight is None and bool(keys.all()):
        return None
    implementation = implementation or "sdpa"
    if implementation.startswith("flash"):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot hide padding or blocks here; use sdpa or flex_attention, "
            "or a model with full attention and prompts of equal length"
        )
    rule = _rule(keys, sight)
    rows, width = keys.shape
    if implementation.startswith("flex"):
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(rule, rows, None, queries, width, device=str(keys.device))
    row, query, key = (torch.arange(size, device=keys.device) for size in (rows, queries, width))
    mask = rule(row[:, None, None, None], row[:0], query[:, None], key).expand(-1, 1, queries, -1)  # [R, 1, Q, S]
    if implementation.startswith("eager"):
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def _rule(keys: Tensor, sight: Sight | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, from indices of row, head (unused), query and key that broadcast."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        real = keys[row, key]
        if sight is None:
            return real
        seen = sight.places[row, key] < sight.horizons[row, query]
        if sight.blocks is not None:
            noisy = sight.places[row, key] == NOWHERE
            seen = seen | (noisy & (sight.blocks[row, key] == sight.blocks[row, query]))
        if sight.hidden is not None:
            seen = seen & (sight.hidden[row, query] != key)
        if sight.unseen is not None:
            seen = seen & ~sight.unseen[row, query, key]
        return real & seen

    return visible
