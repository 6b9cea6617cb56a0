"""Mixtures of token embeddings, which some schedules feed where nothing is written yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mixed_embeddings(probabilities: Tensor, embedding: Any) -> Tensor:
    """The mean embedding under distributions over tokens, as the model's embedding module would give it.

    Args:
        probabilities: `[n, V]`. embedding: the module, with at least V rows.

    Returns:
        `[n, D]` in the module's dtype.

    Raises:
        ValueError: the module gives something else than the rows of its weight, or those times a factor that it states
            (`embed_scale`): there it is sharded over processes, or has an adapter.
    """
    weight = embedding.weight
    tokens = probabilities.shape[-1]
    if weight.dim() != 2 or len(weight) < tokens or hasattr(weight, "placements"):
        raise ValueError(
            f"the embeddings have a weight of shape {list(weight.shape)} here, where {tokens} rows are needed: they "
            "are sharded over processes. Decode with a model that is whole on each process, or choose a schedule that "
            "feeds tokens only"
        )
    scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0), dtype=weight.dtype, device=weight.device)
    sample = probabilities.argmax(-1)[:1]
    if not torch.allclose(embedding(sample), weight[sample] * scale, rtol=1e-3):
        raise ValueError(
            f"the embeddings of {type(embedding).__name__} are not the rows of its weight (an adapter?), so they "
            "cannot be mixed; merge it, or choose a schedule that feeds tokens only"
        )
    return (probabilities.to(weight.dtype) @ weight[:tokens]) * scale
