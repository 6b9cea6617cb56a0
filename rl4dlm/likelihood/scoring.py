"""Log-probabilities of what views hide, from one forward of the wrapped model.

Owns how views become a model batch and how its answers find their places. The head, the shift and the attention mask
are `attach_scoring`'s; which views to score is an estimator's business.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl4dlm.likelihood.views import Views
from rl4dlm.models.spec import DiffusionSpec


class ViewScores(NamedTuple):
    """Per view and canvas token; zero where the weight is zero. Both carry gradients."""

    log_probs: Tensor  # [B, K, L]
    entropies: Tensor  # [B, K, L], in nats


def score_views(
    model: Any,
    spec: DiffusionSpec,
    ids: Tensor,
    attention_mask: Tensor,
    views: Views,
    *,
    temperature: float = 1.0,
    cfg_scale: float = 0.0,
    rows_per_forward: int | None = None,
) -> ViewScores:
    """Log-probabilities (and entropies) of the true tokens at the positions that the views score.

    Args:
        model: with scoring attached (`attach_scoring`), and wrapped in whatever it is trained in.
        spec: the model's.
        ids: long `[B, T]`, prompt and canvas as they are; the last L positions are the canvas.
        attention_mask: bool or long `[B, T]`, the real tokens; the same for all views of a row.
        views: what is hidden and what it counts for.
        temperature: divides the logits.
        cfg_scale: weight w of classifier-free guidance `u + (w + 1)(c - u)`, where u comes from the same view with the
            whole prompt hidden; 0 is off, otherwise the forward has twice the rows.
        rows_per_forward: score so many rows at a time. Only where no gradient is wanted: several forwards before one
            backward give wrong gradients under DDP and ZeRO with re-entrant checkpointing.

    Returns:
        `[B, K, L]` tensors in float32 or the model's dtype, whichever is wider. They are computed only where the weight
        is not zero; all K views of a row share one forward.

    Raises:
        ValueError: shapes that do not fit, or `rows_per_forward` while gradients are recorded.
    """
    if ids.shape != attention_mask.shape or (len(ids), ids.shape[1]) != (len(views), views.hidden.shape[2]):
        raise ValueError(
            f"ids {list(ids.shape)}, attention_mask {list(attention_mask.shape)} and views "
            f"{list(views.hidden.shape)} do not describe the same [B, T] batch"
        )
    if rows_per_forward is None or rows_per_forward >= len(ids):
        return _forward(model, spec, ids, attention_mask, views, temperature, cfg_scale)
    if torch.is_grad_enabled():
        raise ValueError(f"rows_per_forward={rows_per_forward} needs torch.no_grad(): gradients need a single forward")
    parts = [
        _forward(model, spec, ids[part], attention_mask[part], views[part], temperature, cfg_scale)
        for part in (slice(start, start + rows_per_forward) for start in range(0, len(ids), rows_per_forward))
    ]
    return ViewScores(torch.cat([p.log_probs for p in parts]), torch.cat([p.entropies for p in parts]))


def _forward(
    model: Any,
    spec: DiffusionSpec,
    ids: Tensor,
    attention_mask: Tensor,
    views: Views,
    temperature: float,
    cfg_scale: float,
) -> ViewScores:
    batch, num_views, length = views.hidden.shape
    canvas = views.weight.shape[2]
    inputs = views.apply(ids, spec.mask_token_id).flatten(0, 1)  # [B * K, T]
    keys = attention_mask.bool().repeat_interleave(num_views, dim=0)
    scored = views.scored.flatten(0, 1)  # [B * K, L]
    positions = torch.cat([scored.new_zeros(batch * num_views, length - canvas), scored], dim=1)
    if cfg_scale > 0:
        unconditional = inputs.clone()
        unconditional[:, : length - canvas] = spec.mask_token_id
        inputs, keys = torch.cat([inputs, unconditional]), torch.cat([keys, keys])
    scores = model(
        input_ids=inputs,
        attention_mask=keys,
        score_positions=positions,
        score_targets=ids.repeat_interleave(num_views, dim=0),
        score_temperature=temperature,
        score_cfg_scale=cfg_scale,
    )

    def place(values: Tensor) -> Tensor:
        return values.new_zeros(scored.shape).masked_scatter(scored, values).view(batch, num_views, canvas)

    return ViewScores(place(scores.log_probs), place(scores.entropies))
