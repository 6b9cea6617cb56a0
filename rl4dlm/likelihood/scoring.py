"""Log-probabilities of what views hide, from one forward of the wrapped model.

Owns how views become a model batch and how its answers find their places. The head, the shift and the attention mask
are `attach_scoring`'s; which views to score is an estimator's business.

A view means what the model's attention makes of it. With `full` and `causal` attention a hidden token is predicted from
everything the view shows that attention lets it see. A model that denoises block by block never predicts a block from
noisy ones: there every block of the canvas is scored given its own tokens as the view shows them and the finished
tokens of all blocks before it, whatever the view hides of those; prompt tokens that a view hides stay hidden. One
forward of a noisy and a clean copy gives all blocks (block diffusion, arXiv 2503.09573), so that a view is a state of
every block at once, and K views replay K steps of all of them.

Views that show the same are fed once. Where everything is hidden that completions of a prompt differ in, as in the mean
field of diffu-GRPO and in the full view of coupled-GRPO, all of a group ask for one input, and each for the
log-probabilities of its own tokens there. Only a model that is a function of its input can be asked like this: with
dropout switched on every view is fed.

`reduce_views` asks the same for whatever else is made of the distributions at scored positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from rl4dlm.likelihood.choices import Choices
from rl4dlm.likelihood.views import Views
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.distributions import PositionReduction
from rl4dlm.models.spec import DiffusionSpec


class ViewScores(NamedTuple):
    """Per view and canvas token; zero where the weight is zero. All carry gradients."""

    log_probs: Tensor  # [B, K, L]
    entropies: Tensor  # [B, K, L], in nats
    next_log_probs: Tensor | None = None  # [B, T], of tokens that were asked for as next tokens, zero elsewhere
    values: Tensor | None = None  # [B, K, L], of the states that tokens are predicted from, where asked for
    choices: Tensor | None = None  # [B, K, L], log-probabilities of the choice of tokens' slots, where asked for


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
    share: bool = True,
    in_step: int | None = None,
    values: bool = False,
    of: str = "log_prob",
    choices: Choices | None = None,
) -> ViewScores:
    """Log-probabilities (and entropies) of the true tokens, or the views' own, at the positions that the views score.

    Args:
        model: with scoring attached (`attach_scoring`), and wrapped in whatever it is trained in.
        spec: the model's.
        ids: long `[B, T]`, prompt and canvas as they are; the last L positions are the canvas.
        attention_mask: bool or long `[B, T]`, the real tokens; the same for all views of a row.
        views: what is hidden and what it counts for.
        temperature: divides the logits.
        cfg_scale: weight w of classifier-free guidance `u + (w + 1)(c - u)`, where u comes from the same view with the
            whole prompt hidden; 0 is off, otherwise the forward has twice the rows.
        rows_per_forward: score so many rows, with all their views, or with `one_view` so many views, at a time. Only
            where no gradient is wanted: several forwards before one backward give wrong gradients under DDP and ZeRO
            with re-entrant checkpointing.
        prompt_lengths: long `[B]`, real tokens before each row's response, where a block grid may start. None: those
            before the last L positions.
        next_tokens: bool `[B, T]`, tokens also to be predicted from the clean ones before them, as a causal model does;
            for attention `context_causal`, where the clean copy is causal. The first column cannot be.
        one_view: score the views one after another inside the wrapped forward, each computed again in the backward
            pass: the memory of one view instead of K, for the time of one more forward. Numbers are the same.
        unseen: bool `[B, T, T]`, tokens that do not see each other besides; for full attention.
        share: feed equal inputs once. Never done with `unseen`, or where dropout makes equal inputs score differently;
            with `one_view` the inputs of a view are compared with each other, not with those of other views.
        in_step: run as many forwards with `rows_per_forward` as so many rows would without sharing, of at least one
            input each: all processes then run the same number, which they must where forwards gather parameters.
        values: ask the model's value head, too; not together with `next_tokens`.
        of: what the score of a token is, one of `rl4dlm.models.reductions.SCORES`: log-probabilities, or centred logits
            in the place of `log_probs`.
        choices: ask the model's unmasking policy about the choices of the views' steps, too; not together with
            `next_tokens`, `values` or guidance.

    Returns:
        `[B, K, L]` tensors in float32 or the model's dtype, whichever is wider. They are computed only where the weight
        is not zero; all K views of a row share one call of the model.

    Raises:
        ValueError: shapes that do not fit, guidance without a mask token, or `rows_per_forward` while gradients are
            recorded.
    """
    if next_tokens is not None and (next_tokens.shape != ids.shape or next_tokens[:, 0].any() or cfg_scale > 0):
        raise ValueError(
            f"next_tokens must be [B, T] = {list(ids.shape)}, without the first column, and cfg_scale 0; got "
            f"{list(next_tokens.shape)} and cfg_scale={cfg_scale}"
        )
    if next_tokens is not None and values:
        raise ValueError("values=True is not supported with next_tokens")
    if cfg_scale > 0 and spec.mask_token_id is None:
        raise ValueError(
            f"cfg_scale={cfg_scale} needs a mask token to hide the prompt behind; allowed for this model: 0"
        )
    batch, num_views, length = views.hidden.shape
    canvas = views.weight.shape[2]
    targets = ids.repeat_interleave(num_views, dim=0)
    if views.targets is not None:
        targets = torch.cat([targets[:, : length - canvas], views.targets.flatten(0, 1)], dim=1)
    if choices is not None and (next_tokens is not None or values or cfg_scale > 0):
        raise ValueError(f"choices are not supported with next_tokens, values or cfg_scale={cfg_scale}")
    ask = {"score_targets": targets, **({} if choices is None else choices.asked)}
    if next_tokens is not None:  # the views of a row share its clean tokens: the first one's are enough
        following = next_tokens.new_zeros(batch, num_views, length)
        following[:, 0] = next_tokens
        ask["score_next_tokens"] = following.flatten(0, 1)
    settings: dict[str, Any] = {"score_temperature": temperature, "score_cfg_scale": cfg_scale}
    if values:
        settings["score_values"] = True
    if of != "log_prob":
        settings["score_of"] = of
    # Guidance hides the prompt from a second copy of every input.
    bare = None
    if cfg_scale > 0:
        assert spec.mask_token_id is not None
        bare = length - canvas, spec.mask_token_id
    given = _Given(ids, attention_mask, views, prompt_lengths, unseen)
    limits = _Limits(rows_per_forward, one_view, share, in_step)
    parts, rows = _in_parts(model, spec, given, limits, ask, settings, bare)
    places = torch.cat(rows).argsort()
    found = [torch.cat(column)[places] for column in zip(*parts, strict=True)]
    log_probs, entropies = (each.view(batch, num_views, canvas) for each in found[:2])
    if values:
        return ViewScores(log_probs, entropies, values=found[2].view(batch, num_views, canvas))
    if choices is not None:
        return ViewScores(log_probs, entropies, choices=found[2].view(batch, num_views, canvas))
    return ViewScores(log_probs, entropies, found[2].view(batch, num_views, length)[:, 0] if len(found) > 2 else None)


def reduce_views(
    model: Any,
    spec: DiffusionSpec,
    ids: Tensor,
    attention_mask: Tensor,
    views: Views,
    reduction: PositionReduction,
    *,
    temperature: float = 1.0,
    rows_per_forward: int | None = None,
    prompt_lengths: Tensor | None = None,
    one_view: bool = False,
    unseen: Tensor | None = None,
    share: bool = True,
    in_step: int | None = None,
    noisy_history: bool = False,
) -> tuple[Tensor, ...]:
    """What a reduction makes of distributions at the n scored positions of views, in row-major order of `[B, K, L]`.

    Views that show the same share a forward, but not the head.

    Args:
        model, spec, ids, attention_mask, views: as in `score_views`.
        reduction: see `rl4dlm.models.distributions`; its tensors have an entry for each of the n positions.
        temperature, rows_per_forward, prompt_lengths, one_view, unseen, share, in_step: as in `score_views`.
        noisy_history: for a model that denoises block by block: every block sees those before it as the view shows
            them, as in a pipeline of several open blocks (D2F), and not finished.

    Returns:
        Its tensors, `[n, ...]` each. With gradients, but for a `rows_per_forward` that makes several forwards.

    Raises:
        ValueError: as `score_views`.
    """
    given = _Given(ids, attention_mask, views, prompt_lengths, unseen, noisy_history)
    limits = _Limits(rows_per_forward, one_view, share, in_step)
    settings = {"score_temperature": temperature}
    parts, rows = _in_parts(model, spec, given, limits, {}, settings, None, reduction)
    scored = views.scored.flatten(0, 1)
    number = (scored.flatten().cumsum(0) - 1).view_as(scored)
    places = torch.cat([number[of][scored[of]] for of in rows]).argsort()
    return tuple(torch.cat(column)[places] for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class _Given:
    """What is scored; as in `score_views`."""

    ids: Tensor
    attention_mask: Tensor
    views: Views
    prompt_lengths: Tensor | None
    unseen: Tensor | None
    noisy_history: bool = False


@dataclass(frozen=True)
class _Limits:
    """How much at a time; as in `score_views`."""

    rows_per_forward: int | None
    one_view: bool
    share: bool
    in_step: int | None


def _in_parts(
    model: Any,
    spec: DiffusionSpec,
    given: _Given,
    limits: _Limits,
    ask: dict[str, Tensor],
    settings: dict[str, Any],
    bare: tuple[int, int] | None,
    reduction: PositionReduction | None = None,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What one call of the model finds, or several; and which of the B K views each is about, long `[N]`.

    Args:
        ask: what is asked of each view, `[B K, T]`, besides the positions. bare: as in `_forward`.
    """
    ids, attention_mask, views = given.ids, given.attention_mask, given.views
    if ids.shape != attention_mask.shape or (len(ids), ids.shape[1]) != (len(views), views.hidden.shape[2]):
        raise ValueError(
            f"ids {list(ids.shape)}, attention_mask {list(attention_mask.shape)} and views "
            f"{list(views.hidden.shape)} do not describe the same [B, T] batch"
        )
    batch, num_views, length = views.hidden.shape
    canvas = views.weight.shape[2]
    prompt_lengths = given.prompt_lengths
    if prompt_lengths is None:
        prompt_lengths = attention_mask[:, : length - canvas].bool().sum(-1)
    share = limits.share and given.unseen is None and not _is_random(model)
    rows_per_forward, in_step = limits.rows_per_forward, limits.in_step
    split = rows_per_forward is not None and rows_per_forward < max(batch, in_step or 0)
    turns = num_views if limits.one_view and not split else 1  # rows are b * K + k: every K-th is a view of each row
    if turns > 1:
        settings = {**settings, "score_in_turn": turns}
    inputs = _inputs(spec, ids, attention_mask, views, prompt_lengths, given, turns)
    scored = views.scored.flatten(0, 1)  # [B * K, L]
    before = scored.new_zeros(len(scored), length - canvas)
    ask = {"score_positions": torch.cat([before, scored], dim=1), **ask}
    wanted, of = inputs.distinct() if share else inputs.all()
    if not split:
        everything = torch.arange(len(scored), device=scored.device)
        return [_forward(model, inputs[wanted], of, ask, canvas, settings, bare, share, reduction)], [everything]
    if torch.is_grad_enabled():
        raise ValueError(f"rows_per_forward={rows_per_forward} needs torch.no_grad(): gradients need a single forward")
    assert rows_per_forward is not None
    size = rows_per_forward * (1 if limits.one_view else num_views)
    forwards = -((in_step or 0) * num_views // -size)
    size = -(len(wanted) // -forwards) if in_step else size
    number = (scored.flatten().cumsum(0) - 1).view_as(scored)
    parts, order = [], []
    for start in range(0, len(wanted), size):
        rows = ((of >= start) & (of < start + size)).nonzero().squeeze(-1)
        part, asked = inputs[wanted[start : start + size]], {name: value[rows] for name, value in ask.items()}
        own = None if reduction is None else reduction.picked(number[rows][scored[rows]])
        parts.append(_forward(model, part, of[rows] - start, asked, canvas, settings, bare, share, own))
        order.append(rows)
    for _ in range(forwards - len(parts)):  # forwards that nothing is asked of
        nothing = {name: torch.zeros_like(value[:1]) for name, value in ask.items()}
        own = None if reduction is None else reduction.picked(of[:0])
        _forward(model, inputs[wanted[:1]], torch.zeros_like(of[:1]), nothing, canvas, settings, bare, share, own)
    return parts, order


@dataclass
class _Inputs:
    """What is fed to a forward: R corrupted copies, and what else the scores of their tokens depend on."""

    ids: Tensor  # long [R, T]
    keys: Tensor  # bool [R, T]
    turn: Tensor  # long [R], which of several forwards inside the call a row belongs to
    finished: Tensor | None = None  # long [R, L], the clean canvas, for models that denoise block by block
    prompt_lengths: Tensor | None = None  # long [R], for these, too
    unseen: Tensor | None = None  # bool [R, T, T]
    absent: Tensor | None = None  # bool [R, T], tokens that the noisy copy lacks
    turns: int = 1  # so many forwards

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> _Inputs:
        others = {"finished": self.finished, "prompt_lengths": self.prompt_lengths, "unseen": self.unseen}
        others["absent"] = self.absent
        picked: dict[str, Any] = {name: None if value is None else value[rows] for name, value in others.items()}
        return _Inputs(self.ids[rows], self.keys[rows], self.turn[rows], **picked, turns=self.turns)

    def all(self) -> tuple[Tensor, Tensor]:
        """What `distinct` says of rows that all differ."""
        rows = torch.arange(len(self), device=self.ids.device)
        return rows, rows

    def distinct(self) -> tuple[Tensor, Tensor]:
        """Rows that differ, long `[U]`, by turn and then in their order, and which of these each row equals, `[R]`."""
        parts = [self.turn[:, None], 2 * self.ids + self.keys]  # positions are counted from the first real token
        parts += [] if self.finished is None else [self.finished]
        parts += [] if self.prompt_lengths is None else [self.prompt_lengths[:, None]]
        parts += [] if self.absent is None else [self.absent.long()]
        unique, of = torch.unique(torch.cat(parts, dim=1), dim=0, return_inverse=True)
        if len(unique) == len(self) and self.turns == 1:
            return self.all()
        rows = torch.arange(len(self), device=self.ids.device)
        first = rows.new_full((len(unique),), len(self)).scatter_reduce_(0, of, rows, "amin")
        order = (self.turn[first] * len(self) + first).argsort()
        return first[order], order.argsort()[of]

    def with_bare(self, prompt: int, mask_token_id: int) -> _Inputs:
        """The rows, and behind them the same ones with the first `prompt` columns hidden: `[2 R]`."""
        both = self[torch.arange(len(self), device=self.ids.device).repeat(2)]
        both.ids[len(self) :, :prompt] = mask_token_id
        return both


def _inputs(
    spec: DiffusionSpec,
    ids: Tensor,
    attention_mask: Tensor,
    views: Views,
    prompt_lengths: Tensor,
    given: _Given,
    turns: int,
) -> _Inputs:
    """Those of all views, `[B * K]`."""
    num_views, blocks = views.hidden.shape[1], spec.attention in BLOCK_KINDS
    if views.absent is not None and (not blocks or given.noisy_history):
        raise ValueError(
            "views with absent tokens have a meaning for models that denoise block by block, with finished blocks "
            f"before; here attention={spec.attention!r}"
        )

    def of_views(values: Tensor) -> Tensor:
        return values.repeat_interleave(num_views, dim=0)

    corrupted = views.apply(ids, spec.mask_token_id).flatten(0, 1)
    finished = ids[:, ids.shape[1] - views.weight.shape[2] :]
    return _Inputs(
        ids=corrupted,
        keys=of_views(attention_mask.bool()),
        turn=torch.arange(len(corrupted), device=ids.device) % turns,
        finished=of_views(finished) if blocks and not given.noisy_history else None,
        prompt_lengths=of_views(prompt_lengths) if blocks else None,
        unseen=None if given.unseen is None else of_views(given.unseen),
        absent=None if views.absent is None else views.absent.flatten(0, 1),
        turns=turns,
    )


def _forward(
    model: Any,
    inputs: _Inputs,
    of: Tensor,
    ask: dict[str, Tensor],
    canvas: int,
    settings: dict[str, Any],
    bare: tuple[int, int] | None,
    share: bool,
    reduction: PositionReduction | None = None,
) -> list[Tensor]:
    """Log-probabilities and entropies `[N, L]` in one call; values too, or `[N, T]` next tokens.

    With a reduction what it makes of the n scored positions, `[n, ...]`.

    Args:
        inputs: U rows. of: long `[N]`, which of them each row of `ask` is about. canvas: L.
        bare: what guidance hides from a second copy of each: the first so many columns, behind this token.
    """
    if bare is not None:
        of = torch.cat([of, of + len(inputs)])
        inputs = inputs.with_bare(*bare)
        if share:
            wanted, found_at = inputs.distinct()
            inputs, of = inputs[wanted], found_at[of]
    apart = len(of) == len(inputs) and not (share and inputs.turns > 1)  # then they are in order, too
    extra: dict[str, Any] = {} if apart else {"score_rows": of}
    if inputs.finished is not None:
        prompt = inputs.ids.shape[1] - inputs.finished.shape[1]
        extra["score_clean_ids"] = torch.cat([inputs.ids[:, :prompt], inputs.finished], dim=1)
    if inputs.prompt_lengths is not None:
        extra["score_prompt_lengths"] = inputs.prompt_lengths
    if inputs.unseen is not None:
        extra["score_unseen"] = inputs.unseen
    if inputs.absent is not None:
        extra["score_absent"] = inputs.absent
    if reduction is not None:
        extra["score_reduce"] = reduction
    scores = model(input_ids=inputs.ids, attention_mask=inputs.keys, **ask, **settings, **extra)
    if reduction is not None:
        return list(scores)
    positions, following = ask["score_positions"], ask.get("score_next_tokens")
    count = len(scores.log_probs) - (0 if following is None else int(following.sum()))
    placed = [
        values.new_zeros(positions.shape).masked_scatter(positions, values[:count])[:, -canvas:] for values in scores
    ]
    if following is not None:
        values = scores.log_probs[count:]
        placed.append(values.new_zeros(following.shape).masked_scatter(following, values))
    return placed


def _is_random(model: Any) -> bool:
    """Whether equal inputs may score differently: dropout is switched on somewhere."""
    for module in model.modules():
        if module.training:
            share = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0)
            if isinstance(share, float) and share > 0:
                return True
    return False
