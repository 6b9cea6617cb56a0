"""Log-probabilities of what views hide, from one forward of the wrapped model.

Owns how views become a model batch and how its answers find their places. The head, the shift and the attention mask
are `attach_scoring`'s; which views to score is an estimator's business.

A view means what the model's attention makes of it. With `full` and `causal` attention a hidden token is predicted from
everything the view shows that attention lets it see. A model that denoises block by block never predicts a block from
noisy ones: there every block of the canvas is scored given its own tokens as the view shows them and the finished
tokens of all blocks before it, whatever the view hides of those; prompt tokens that a view hides stay hidden. One
forward of a noisy and a clean copy gives all blocks (block diffusion, arXiv 2503.09573), so that a view is a state of
every block at once, and K views replay K steps of all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl4dlm.likelihood.views import Views
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec


class ViewScores(NamedTuple):
    """Per view and canvas token; zero where the weight is zero. All carry gradients."""

    log_probs: Tensor  # [B, K, L]
    entropies: Tensor  # [B, K, L], in nats
    next_log_probs: Tensor | None = None  # [B, T], of tokens that were asked for as next tokens, zero elsewhere


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
    prompt_lengths: Tensor | None = None,
    next_tokens: Tensor | None = None,
    one_view: bool = False,
    unseen: Tensor | None = None,
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
        prompt_lengths: long `[B]`, real tokens before each row's response, where a block grid may start. None: those
            before the last L positions.
        next_tokens: bool `[B, T]`, tokens also to be predicted from the clean ones before them, as a causal model does;
            for attention `context_causal`, where the clean copy is causal. The first column cannot be.
        one_view: score the views one after another inside the wrapped forward, each computed again in the backward
            pass: the memory of one view instead of K, for the time of one more forward. Numbers are the same.
        unseen: bool `[B, T, T]`, tokens that do not see each other besides; for full attention.

    Returns:
        `[B, K, L]` tensors in float32 or the model's dtype, whichever is wider. They are computed only where the weight
        is not zero; all K views of a row share one call of the model.

    Raises:
        ValueError: shapes that do not fit, guidance without a mask token, or `rows_per_forward` while gradients are
            recorded.
    """
    if ids.shape != attention_mask.shape or (len(ids), ids.shape[1]) != (len(views), views.hidden.shape[2]):
        raise ValueError(
            f"ids {list(ids.shape)}, attention_mask {list(attention_mask.shape)} and views "
            f"{list(views.hidden.shape)} do not describe the same [B, T] batch"
        )
    if next_tokens is not None and (next_tokens.shape != ids.shape or next_tokens[:, 0].any() or cfg_scale > 0):
        raise ValueError(
            f"next_tokens must be [B, T] = {list(ids.shape)}, without the first column, and cfg_scale 0; got "
            f"{list(next_tokens.shape)} and cfg_scale={cfg_scale}"
        )
    if cfg_scale > 0 and spec.mask_token_id is None:
        raise ValueError(
            f"cfg_scale={cfg_scale} needs a mask token to hide the prompt behind; allowed for this model: 0"
        )
    if prompt_lengths is None:
        prompt_lengths = attention_mask[:, : ids.shape[1] - views.weight.shape[2]].bool().sum(-1)

    def forward(rows: slice) -> ViewScores:
        batch = ids[rows], attention_mask[rows], views[rows], prompt_lengths[rows]
        following = None if next_tokens is None else next_tokens[rows]
        hidden_pairs = None if unseen is None else unseen[rows]
        return _forward(model, spec, *batch, temperature, cfg_scale, following, one_view, hidden_pairs)

    if rows_per_forward is None or rows_per_forward >= len(ids):
        return forward(slice(None))
    if torch.is_grad_enabled():
        raise ValueError(f"rows_per_forward={rows_per_forward} needs torch.no_grad(): gradients need a single forward")
    parts = [forward(slice(start, start + rows_per_forward)) for start in range(0, len(ids), rows_per_forward)]
    following = [p.next_log_probs for p in parts if p.next_log_probs is not None]
    return ViewScores(
        torch.cat([p.log_probs for p in parts]),
        torch.cat([p.entropies for p in parts]),
        torch.cat(following) if following else None,
    )


def _forward(
    model: Any,
    spec: DiffusionSpec,
    ids: Tensor,
    attention_mask: Tensor,
    views: Views,
    prompt_lengths: Tensor,
    temperature: float,
    cfg_scale: float,
    next_tokens: Tensor | None,
    one_view: bool,
    unseen: Tensor | None,
) -> ViewScores:
    batch, num_views, length = views.hidden.shape
    canvas = views.weight.shape[2]
    inputs = views.apply(ids, spec.mask_token_id).flatten(0, 1)  # [B * K, T]
    targets = ids.repeat_interleave(num_views, dim=0)
    keys = attention_mask.bool().repeat_interleave(num_views, dim=0)
    scored = views.scored.flatten(0, 1)  # [B * K, L]
    positions = torch.cat([scored.new_zeros(batch * num_views, length - canvas), scored], dim=1)
    copies = 2 if cfg_scale > 0 else 1
    if cfg_scale > 0:
        unconditional = inputs.clone()
        unconditional[:, : length - canvas] = spec.mask_token_id
        inputs, keys = torch.cat([inputs, unconditional]), torch.cat([keys, keys])
    extra: dict[str, Any] = {}
    if spec.attention in BLOCK_KINDS:
        finished = targets[:, length - canvas :].repeat(copies, 1)
        extra["score_clean_ids"] = torch.cat([inputs[:, : length - canvas], finished], dim=1)
        extra["score_prompt_lengths"] = prompt_lengths.repeat_interleave(num_views).repeat(copies)
    if next_tokens is not None:  # the views of a row share its clean tokens: the first one's are enough
        extra["score_next_tokens"] = next_tokens.new_zeros(batch, num_views, length)
        extra["score_next_tokens"][:, 0] = next_tokens
        extra["score_next_tokens"] = extra["score_next_tokens"].flatten(0, 1)
    if unseen is not None:
        extra["score_unseen"] = unseen.repeat_interleave(num_views, dim=0).repeat(copies, 1, 1)
    if one_view and num_views > 1:  # rows are b * K + k, so that every K-th row is a view of each sequence
        extra["score_in_turn"] = num_views
    scores = model(
        input_ids=inputs,
        attention_mask=keys,
        score_positions=positions,
        score_targets=targets,
        score_temperature=temperature,
        score_cfg_scale=cfg_scale,
        **extra,
    )

    def place(values: Tensor) -> Tensor:
        return values.new_zeros(scored.shape).masked_scatter(scored, values).view(batch, num_views, canvas)

    if next_tokens is None:
        return ViewScores(place(scores.log_probs), place(scores.entropies))
    count = len(scores.log_probs) - int(next_tokens.sum())
    following = scores.log_probs.new_zeros(next_tokens.shape).masked_scatter(next_tokens, scores.log_probs[count:])
    return ViewScores(place(scores.log_probs[:count]), place(scores.entropies[:count]), following)
