"""The one owner of the vocabulary head.

`attach_scoring` extends a model's own forward: given positions it returns what a reduction makes of the logits there
(log-probabilities and entropies by default), a chunk of positions at a time, so that a `[B, T, V]` tensor never exists.
It runs inside the wrapped module, where the shards of FSDP and ZeRO-3 are gathered. Rollout and likelihood both call
this and nothing else touches the head. Owns neither what is masked nor what the numbers are used for.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rl4dlm.models.adapters import base_model
from rl4dlm.models.attention import (
    BLOCK_KINDS,
    Sight,
    attention_mask as build_mask,
    block_starts,
    check_attention,
    one_copy,
    position_ids as build_positions,
    two_copies,
)
from rl4dlm.models.canvas import canvas_states, denoises_canvases
from rl4dlm.models.checkpoint import listed, unfinite
from rl4dlm.models.distributions import HiddenStates
from rl4dlm.models.in_turn import score_in_turn
from rl4dlm.models.reductions import ChosenScores, Reduction, TokenScores, ValuedScores, log_prob_reduction
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.unmasking import choice_scores, slot_states

CHUNK_ELEMENTS = 2**26
"""Logits held at once, in elements: 256 MiB in float32."""


def attach_scoring(model: Any) -> Any:
    """Teaches `model.forward` to score positions; returns the model. Attaching twice changes nothing.

    Call it before the model is wrapped (PEFT, DDP, FSDP, DeepSpeed), and never `copy.deepcopy` the model afterwards:
    the copy's forward would still use the original's weights. Afterwards

        model(input_ids, attention_mask, position_ids, score_positions=..., score_targets=..., ...)

    returns `TokenScores` instead of logits, where

    - `input_ids`: long `[R, T]`; `attention_mask`: bool or long `[R, T]` marking real tokens (None: all are), or a
      ready 4-D mask or BlockMask; `position_ids`: long `[R, T]`, counted from the first real token when None;
    - `inputs_embeds`: `[R, T, D]`, fed in place of the embeddings of `input_ids`, which are needed all the same;
    - `score_positions`: bool `[R, T]`, the positions whose token is scored, or their rows and columns, long `[n]` each;
    - `score_targets`: long `[R, T]`, the token scored at each of them;
    - `score_temperature`: float, divides the logits;
    - `score_cfg_scale`: float w; if > 0, classifier-free guidance `u + (w + 1)(c - u)` combines the logits c of the
      first half of the rows with u of the second, and positions and targets are given for the first half only;
    - `score_of`: what the score of a target is, one of `SCORES`: its log-probability, or its logit above their mean;
    - `score_reduce`: a `Reduction` instead of the default one; `score_targets` is then not needed. `HiddenStates` asks
      for what the head would be applied to;
    - `score_reduce_sees_own`: True hands the reduction, third, the model's own logits: those before guidance;
    - `score_prompt_lengths`: long `[R]`, real tokens before the response; needed where a block grid starts there;
    - `score_clean_ids`: long `[R, T]`, for models that denoise block by block: the finished sequence of which
      `input_ids` is a noisy copy. Each position is then scored given its own block of the noisy copy and the blocks
      before it of the clean one, all blocks in one forward. Without it `input_ids` is all there is, as while decoding;
    - `score_next_tokens`: bool `[R, T]`, with `score_clean_ids` and `context_causal` attention, whose clean copy is
      causal: tokens also scored given those before them in the clean copy, as a causal model does and whatever the
      shift. Their entries come behind those of `score_positions`. The first column has no predecessor.

    - `score_unseen`: bool `[R, T, T]`, for full attention: pairs of a query and a key that are hidden from each other
      besides;
    - `score_absent`: bool `[R, T]`, with `score_clean_ids`: tokens that the noisy copy lacks, so that their own block
      does not see them; the clean copy has them;
    - `score_values`: True adds what the model's value head (`value_head.py`) makes of the state that each token is
      predicted from, without guidance, to a `ValuedScores`; not together with `score_reduce`;
    - `score_states`: int W, with `score_reduce`: behind what the reduction finds comes the last hidden state that each
      token of the last W columns is predicted from, `[R, W, D]`;
    - `score_order`, `score_flags`, `score_time`: what the model's unmasking policy (`unmasking.py`) is asked about the
      last L columns, `[R, L]`, `[R, L, 3]` and `[R]`; its log-probability of each scored token's place is then part of
      a `ChosenScores`. For full attention, and not together with `score_reduce`, `score_values` or guidance;
    - `score_rows`: long `[N]`, or `[2 N]` with guidance: rows that ask for the same input share a forward. Positions,
      targets and `score_next_tokens` are then `[N, T]`, row i of them is about the fed row `score_rows[i]`, and with
      guidance u comes from the fed row `score_rows[N + i]`. Positions that several rows ask for go through the head
      once, whatever their targets are; with `score_reduce` the head is not shared;
    - `score_in_turn`: int K; the rows are scored in K forwards of every K-th row each, one after the other, and each is
      computed again in the backward pass, so that activations of one forward at a time are in memory. It is still one
      call of the wrapped model before one backward pass. With `score_rows` it is every K-th of the N rows, and the fed
      rows are in the order of the turns that ask for them. Not together with `score_next_tokens`, and with reductions
      that can be `picked` only (`distributions.py`).

    A model that denoises canvases over an encoded prefix needs the mask, targets, prompt lengths and clean ids; each
    canvas is a forward of its own there, and positions are always counted from the first real token.

    Log-probabilities are those of the softmax over the whole vocabulary, mask token included, in float32 or the model's
    dtype, whichever is wider. The logit shift of the spec is applied here. Without `score_positions` the forward is the
    model's own.

    Raises:
        ValueError: the model has no spec, its attention implementation cannot run its attention kind, or its logits
            are not its head applied to its last hidden state.
    """
    base = base_model(model)
    if getattr(base, "_scores_positions", False):
        return model
    spec = DiffusionSpec.of(base)
    check_attention(spec, getattr(base.config, "_attn_implementation", None))
    check_head(base)
    original = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, score_positions: Tensor | None = None, **kwargs: Any) -> Any:
        if score_positions is None:
            return original(*args, **kwargs)
        # The spec as it is now: training may change the length of the blocks.
        score = _score_canvases if denoises_canvases(self) else _score
        spec, in_turn = DiffusionSpec.of(self), kwargs.pop("score_in_turn", 1)
        if in_turn > 1:
            return score_in_turn(score, self, spec, in_turn, *args, score_positions=score_positions, **kwargs)
        return score(self, spec, *args, score_positions=score_positions, **kwargs)

    base.forward = types.MethodType(forward, base)
    base._scores_positions = True
    return model


def _score(
    model: Any,
    spec: DiffusionSpec,
    input_ids: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    *,
    score_positions: Tensor | tuple[Tensor, Tensor],
    score_targets: Tensor | None = None,
    score_temperature: float = 1.0,
    score_cfg_scale: float = 0.0,
    score_reduce: Reduction | None = None,
    score_reduce_sees_own: bool = False,
    score_prompt_lengths: Tensor | None = None,
    score_clean_ids: Tensor | None = None,
    score_next_tokens: Tensor | None = None,
    score_unseen: Tensor | None = None,
    score_absent: Tensor | None = None,
    score_rows: Tensor | None = None,
    score_values: bool = False,
    score_of: str = "log_prob",
    score_states: int | None = None,
    score_order: Tensor | None = None,
    score_flags: Tensor | None = None,
    score_time: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    if isinstance(score_positions, tuple):
        rows, columns = score_positions
    else:
        rows, columns = score_positions.nonzero(as_tuple=True)
    fed = _fed(rows, score_rows)  # [n], which of the fed rows
    sources = (columns - spec.logit_shift).clamp(min=0)  # [n], which of the fed columns predicts each position
    if attention_mask is None and (spec.attention != "full" or score_unseen is not None or position_ids is None):
        attention_mask = torch.ones_like(input_ids)
    if score_absent is not None and score_clean_ids is None:
        raise ValueError("score_absent needs score_clean_ids: it is the noisy copy that lacks tokens")
    if score_next_tokens is not None and (score_clean_ids is None or spec.attention != "context_causal"):
        raise ValueError(
            "score_next_tokens needs score_clean_ids and attention='context_causal', whose clean copy is causal; here "
            f"attention={spec.attention!r}"
        )
    if score_cfg_scale > 0 and spec.attention == "written_first":
        raise ValueError(
            f"score_cfg_scale={score_cfg_scale} is not supported for attention='written_first', where a prompt of mask "
            "tokens would stand behind what is written; it must be 0"
        )
    sight: Sight | None = None
    keys = attention_mask.bool() if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
    if position_ids is None:
        position_ids = build_positions(torch.ones_like(input_ids) if keys is None else keys)
    if score_clean_ids is not None:
        if keys is None or spec.attention not in BLOCK_KINDS:
            raise ValueError(
                f"score_clean_ids has a meaning for attention {' and '.join(BLOCK_KINDS)} and a 2-D attention_mask "
                f"only; here attention={spec.attention!r}"
            )
        starts = block_starts(spec, position_ids, score_prompt_lengths)
        first = _first_noisy(spec, keys, score_prompt_lengths, columns)
        sight = two_copies(spec, position_ids, score_prompt_lengths, first)
        # The token before a block is finished when the block is denoised: a shifted model predicts from its clean copy.
        finished = position_ids[fed, sources] < starts[fed, columns]
        sources = sources - first + finished.long() * input_ids.shape[1]
        if score_next_tokens is not None:
            followers = score_next_tokens.nonzero(as_tuple=True)
            rows, columns = torch.cat([rows, followers[0]]), torch.cat([columns, followers[1]])
            fed = _fed(rows, score_rows)
            sources = torch.cat([sources, input_ids.shape[1] - first + followers[1] - 1])
        input_ids = torch.cat([input_ids[:, first:], score_clean_ids], dim=1)
        position_ids = torch.cat([position_ids[:, first:], position_ids], dim=1)
        noisy = keys if score_absent is None else keys & ~score_absent
        keys = torch.cat([noisy[:, first:], keys], dim=1)
    elif keys is not None:
        sight = one_copy(spec, position_ids, score_prompt_lengths, masked=input_ids == spec.mask_token_id)
    if score_unseen is not None:
        if sight is not None or keys is None:
            raise ValueError(
                "score_unseen has a meaning for attention full and a 2-D attention_mask only; here attention="
                f"{spec.attention!r}"
            )
        sight = Sight(torch.zeros_like(input_ids), torch.ones_like(input_ids), unseen=score_unseen)
    if keys is not None:
        attention_mask = build_mask(keys, input_ids.shape[1], model.config._attn_implementation, model.dtype, sight)
    if kwargs.get("inputs_embeds") is None:
        kwargs["input_ids"] = input_ids
    hidden = model.base_model(
        attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **kwargs
    ).last_hidden_state  # [R, T, D]
    chosen: Tensor | None = None  # [n], of the unmasking policy
    if score_order is not None:
        unfit = score_reduce is not None or score_values or score_cfg_scale > 0 or spec.attention in BLOCK_KINDS
        if unfit or score_flags is None or score_time is None:
            raise ValueError(
                "score_order needs score_flags, score_time and a model without blocks in its attention, and neither "
                "score_reduce, score_values nor guidance"
            )
        states = slot_states(hidden, score_order.shape[1], spec.logit_shift, score_rows)
        slots = columns - (input_ids.shape[1] - score_order.shape[1])
        chosen = choice_scores(model, states, score_order, score_flags, score_time)[rows, slots]
    if score_reduce is None and score_targets is None:
        raise ValueError("score_targets is missing: the tokens to score, long [R, T]")
    guides = None
    if score_cfg_scale > 0:
        count = (len(input_ids) if score_rows is None else len(score_rows)) // 2
        guides = _fed(rows + count, score_rows)
    if score_reduce is None and score_rows is not None:
        assert score_targets is not None
        wanted = score_targets[rows, columns]
        settings = score_temperature, score_cfg_scale, score_values, score_of
        shared = _score_shared(model, hidden, fed, sources, guides, wanted, *settings)
        return shared if chosen is None else ChosenScores(shared[0], shared[1], chosen)
    picked = hidden[fed, sources]  # [n, D]
    guide = None if guides is None else hidden[guides, sources]
    if score_reduce is None:
        assert score_targets is not None
        score_reduce = log_prob_reduction(score_targets[rows, columns], of=score_of)
    elif score_values:
        raise ValueError("score_values is not supported with score_reduce")
    elif isinstance(score_reduce, HiddenStates):
        return (picked,)
    found = reduce_hidden(
        model, picked, guide, score_reduce, score_temperature, score_cfg_scale, sees_own=score_reduce_sees_own
    )
    if score_states is not None:
        return (*found, slot_states(hidden, score_states, spec.logit_shift, score_rows))
    if chosen is not None:
        return ChosenScores(found[0], found[1], chosen)
    return _with_values(model, found, picked) if score_values else found


def _with_values(model: Any, found: tuple[Tensor, ...], picked: Tensor) -> ValuedScores:
    if getattr(model, "value_head", None) is None:
        raise ValueError(f"score_values needs a value head, and this {type(model).__name__} has none")
    return ValuedScores(found[0], found[1], model.value_head(picked))


def _fed(rows: Tensor, score_rows: Tensor | None) -> Tensor:
    return rows if score_rows is None else score_rows[rows]


def _score_shared(
    model: Any,
    hidden: Tensor,
    rows: Tensor,
    sources: Tensor,
    guides: Tensor | None,
    targets: Tensor,
    temperature: float,
    cfg_scale: float,
    values: bool,
    of: str,
) -> TokenScores | ValuedScores:
    """Scores of n tokens, of which several may be predicted from the same state: the head sees each state once.

    Args:
        hidden: `[U, S, D]`. rows, sources: long `[n]`, where in it each token is predicted from. targets: the tokens.
        guides: long `[n]`, rows of the states that guide; the same for all tokens of a state.
    """
    width = hidden.shape[1]
    place = rows * width + sources  # [n]
    used = torch.zeros(hidden.shape[0] * width, dtype=torch.bool, device=hidden.device)
    used[place] = True
    states = used.nonzero().squeeze(-1)  # [m]
    state = (used.cumsum(0) - 1)[place]  # [n], into the m
    guide = None
    if guides is not None:
        guide_of = torch.zeros_like(states).index_put((state,), guides)
        guide = hidden[guide_of, states % width]
    order = state.argsort(stable=True)
    reduction = log_prob_reduction(targets[order], state[order], of)
    picked = hidden.flatten(0, 1)[states]
    found = reduce_hidden(model, picked, guide, reduction, temperature, cfg_scale)
    scores = TokenScores(found[0][order.argsort()], found[1][state])
    return _with_values(model, scores, picked[state]) if values else scores


def _score_canvases(
    model: Any,
    spec: DiffusionSpec,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    score_positions: Tensor,
    score_prompt_lengths: Tensor,
    score_clean_ids: Tensor,
    score_targets: Tensor | None = None,
    score_reduce: Reduction | None = None,
    score_temperature: float = 1.0,
    score_cfg_scale: float = 0.0,
    score_next_tokens: Tensor | None = None,
    score_rows: Tensor | None = None,
    score_values: bool = False,
    score_of: str = "log_prob",
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """`_score` for models that denoise canvases over an encoded prefix."""
    if kwargs.pop("score_absent", None) is not None:
        raise ValueError(f"{type(model).__name__} denoises whole canvases: score_absent is not supported")
    if score_cfg_scale > 0 or score_next_tokens is not None:
        raise ValueError(
            f"{type(model).__name__} has no token to hide a prompt behind and no head on its encoder: score_cfg_scale="
            f"{score_cfg_scale} must be 0, and score_next_tokens None"
        )
    rows, columns = score_positions.nonzero(as_tuple=True)
    hidden, first = canvas_states(
        model, spec, input_ids, score_clean_ids, attention_mask.bool(), score_prompt_lengths, **kwargs
    )
    if score_reduce is not None:
        picked = hidden[_fed(rows, score_rows), columns - first]
        if isinstance(score_reduce, HiddenStates):
            return (picked,)
        return reduce_hidden(model, picked, None, score_reduce, score_temperature, 0.0)
    assert score_targets is not None
    targets = score_targets[rows, columns]
    if score_rows is not None:
        settings = score_temperature, 0.0, score_values, score_of
        return _score_shared(model, hidden, score_rows[rows], columns - first, None, targets, *settings)
    picked = hidden[rows, columns - first]
    reduction = log_prob_reduction(targets, of=score_of)
    found = reduce_hidden(model, picked, None, reduction, score_temperature, 0.0)
    return _with_values(model, found, picked) if score_values else found


def reduce_hidden(
    model: Any,
    picked: Tensor,
    guide: Tensor | None,
    score_reduce: Reduction,
    score_temperature: float,
    score_cfg_scale: float,
    *,
    sees_own: bool = False,
) -> tuple[Tensor, ...]:
    """What the reduction makes of hidden states `[n, D]`, a chunk of them at a time."""

    def chunk(start: int, stop: int) -> tuple[Tensor, ...]:
        logits = own = logits_of(model, picked[start:stop])
        if guide is not None:
            unconditional = logits_of(model, guide[start:stop])
            logits = unconditional + (score_cfg_scale + 1) * (logits - unconditional)
        if score_temperature != 1.0:
            logits = logits / score_temperature
        part = slice(start, stop)
        return score_reduce(logits, part, own) if sees_own else score_reduce(logits, part)

    size = max(1, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    bounds = [(start, min(start + size, len(picked))) for start in range(0, len(picked), size)] or [(0, 0)]
    recompute = torch.is_grad_enabled() and len(bounds) > 1
    parts = [checkpoint(chunk, *b, use_reentrant=False) if recompute else chunk(*b) for b in bounds]
    columns_of = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenScores(*columns_of) if isinstance(parts[0], TokenScores) else tuple(columns_of)


def _first_noisy(spec: DiffusionSpec, keys: Tensor, prompt_lengths: Tensor | None, columns: Tensor) -> int:
    """First column of the noisy copy: early enough for the whole block of every scored column, the same in every batch
    of rows whose responses start at the same column."""
    if prompt_lengths is None:
        return 0
    responses = keys.long().argmax(-1) + prompt_lengths  # [R], behind the padding and the prompt
    first = int(torch.cat([responses, columns]).min())
    assert spec.block_length is not None
    return max(0, first - spec.block_length + 1)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """The head on hidden states `[c, D]`: logits `[c, V]` in float32 or wider, scaled and capped as the config says."""
    logits = model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    config = model.config.get_text_config()
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compares `logits_of` with the model's own logits on three tokens; another transform would differ silently."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so there is nothing to score tokens with")
    sharded = any(hasattr(p, "ds_id") or p.is_meta or p.numel() == 0 for p in model.parameters())
    if sharded:  # ZeRO-3 partitions parameters at loading; outside the wrapped forward there is nothing to compare
        return
    was_training = model.training
    model.eval()
    ids = torch.arange(3, device=model.device)[None] % model.config.get_text_config().vocab_size
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if denoises_canvases(model):
        inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :1].expand(1, model.config.canvas_length)}
    expected = model(**inputs).logits[0]
    actual = logits_of(model, model.base_model(**inputs).last_hidden_state[0])
    model.train(was_training)
    expected = expected.to(actual.dtype)
    if not bool(expected.isfinite().all()):
        names = unfinite(model.named_parameters())
        raise ValueError(
            f"{listed(names)} NaN or infinite somewhere; take weights from before that"
            if names
            else f"the logits of {type(model).__name__} are NaN or infinite although its weights are finite; in "
            f"{model.dtype} they may overflow: load it in float32 or bfloat16"
        )
    tolerance = 1e-5 if head.weight.dtype in (torch.float32, torch.float64) else 2e-2
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
    if not error <= tolerance:
        raise ValueError(
            f"the logits of {type(model).__name__} are not its output embeddings applied to its last hidden state "
            f"(relative difference {error:.2g}); such heads are not supported"
        )
