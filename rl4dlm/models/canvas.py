"""The forward of models that denoise one canvas over an encoded prefix (DiffusionGemma), as scoring needs it.

Owns how such a model is fed: a causal encoder writes the keys and values of a prefix, a bidirectional decoder reads
them and predicts the tokens of one canvas from a corrupted copy. Who sees whom is the model's own. Heads and
reductions are `scoring.py`'s, the decoding loop is `rl4dlm.rollout.uniform`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import position_ids
from rl4dlm.models.spec import DiffusionSpec


def denoises_canvases(model: Any) -> bool:
    """Whether a model (not wrapped) takes a prefix and a canvas instead of one sequence."""
    return getattr(model.config, "model_type", None) == "diffusion_gemma"


def canvas_inputs(ids: Tensor, keys: Tensor, canvas: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward, all of them explicit, so that padding on the left changes nothing.

    Args:
        ids: long `[R, S]`, the prefix, padded on the left.
        keys: bool `[R, S + C]`, the real tokens of prefix and canvas.
        canvas: long `[R, C]`.
    """
    prefix = ids.shape[1]
    positions = position_ids(keys)
    return {
        "input_ids": ids,
        "attention_mask": keys[:, :prefix].long(),
        "position_ids": positions[:, :prefix],
        "decoder_input_ids": canvas,
        "decoder_attention_mask": keys,
        "decoder_position_ids": positions[:, prefix:],
    }


def canvas_states(
    model: Any, spec: DiffusionSpec, noisy: Tensor, clean: Tensor, keys: Tensor, prompt_lengths: Tensor, **kwargs: Any
) -> tuple[Tensor, int]:
    """Last hidden states of every canvas, each given its own noisy tokens and all clean tokens before it.

    There is one forward of the model for each canvas of the response, the same number in every batch: what is encoded
    before one canvas is not kept for the next, because sliding layers forget. The model is not told its predictions of
    an earlier step (its self-conditioning), as in the first step of decoding.

    Args:
        noisy, clean: long `[R, T]`, prompt and response. keys: bool `[R, T]`.
        prompt_lengths: long `[R]`, real tokens before the response, which starts at the same column in all rows.

    Returns:
        Hidden states `[R, T - P, D]` of the response, and P, its first column.

    Raises:
        ValueError: responses that start at different columns, or that are not whole canvases.
    """
    starts = keys.long().argmax(-1) + prompt_lengths
    first, length = int(starts.min()), spec.block_length
    assert length is not None  # checked when scoring was attached
    if int(starts.max()) != first or (noisy.shape[1] - first) % length or noisy.shape[1] == first:
        raise ValueError(
            f"responses must start at one column and be whole canvases of {length} tokens; they start at columns "
            f"{sorted(set(starts.tolist()))} of {noisy.shape[1]}"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    states = [
        model.base_model(
            **canvas_inputs(clean[:, :start], keys[:, : start + length], noisy[:, start : start + length]), **given
        ).last_hidden_state
        for start in range(first, noisy.shape[1], length)
    ]
    return torch.cat(states, dim=1), first
