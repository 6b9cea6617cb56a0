"""Conversations of several turns, for models that denoise block by block (the multi-turn rule of LLaDA2.2).

Owns which tokens of its own block a scored token sees when a block holds pieces of several turns: an answer's end, what
the user or a tool says next, the next answer's start. In one noisy copy of such a block the first answer would be
predicted from what follows it, which it never is while decoding, and the second one from a first one that is half
hidden, although it is finished by then.

A turn is an answer together with what is said before it, from the end of the answer before: so a prompt with one
completion is a single turn. Tokens behind the last answer are a turn without an answer. Two rules:

- `"as_decoded"`: of its own block, a scored token sees its turn as the view shows it, earlier turns finished, and
  nothing of later ones. Scores are those of the row cut behind the turn, earlier answers being part of its prompt: what
  decoding sees, and what reinforcement learning scores, where completions are the last turn of their row.
- `"apart"`: of its own block, it sees its own turn alone. That is the rule as LLaDA2.2's report states it (for the
  first turn of a block; its code was not to be had): an answer's end is then unknown to the next turn until its block
  is over. With a logit shift the first token of a turn is still predicted from the state of the token before it.

Blocks before the own one are seen finished and whole under both, as always: they hold no later turns than the token's.
Turns of a block are scored in views of their own, as many as the block with the most answers needs, so that a batch
without such blocks costs nothing more and is scored to the bit as without a rule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rl4dlm.likelihood.views import Views

TURNS = ("together", "as_decoded", "apart")


def turns_of(targets: Tensor) -> Tensor:
    """The turn of each token, long `[B, T]`, from 0 on: the number of answers that ended before it.

    Args:
        targets: bool `[B, T]`, the tokens of answers; each run of them is one answer.
    """
    ends = targets[:, :-1] & ~targets[:, 1:]
    return pad(ends.long().cumsum(-1), (1, 0))


def by_turn(views: Views, targets: Tensor, real: Tensor, blocks: Tensor, rule: str) -> Views:
    """Views in which no scored token sees more of its own block than a rule allows.

    Args:
        views: K views of rows; their scored tokens are among the targets.
        targets: bool `[B, T]`, the tokens of answers.
        real: bool `[B, T]`, tokens that are no padding.
        blocks: long `[B, T]`, where each token's block starts (`rl4dlm.models.attention.block_starts`).
        rule: `"as_decoded"` or `"apart"`.

    Returns:
        K * N views in the order of the views given, N being the largest number of answers in a block: the n-th of them
        scores the n-th answer in each block. Every token is scored as often as before. The views given, if no block
        holds several turns.

    Raises:
        ValueError: a rule that is neither.
    """
    if rule not in TURNS[1:]:
        raise ValueError(f"turns={rule!r} is not allowed here; choose one of {', '.join(TURNS[1:])}")
    turn = turns_of(targets)
    new = pad(blocks[:, 1:] != blocks[:, :-1], (1, 0), value=True)
    place = new.cumsum(-1) - 1  # of the block in its row
    rank = turn - torch.where(new, turn, 0).cummax(-1).values  # of a turn in its block
    last = torch.zeros_like(rank).scatter_reduce_(1, place, rank.masked_fill(~targets, 0), "amax").gather(1, place)
    count = int(last.max()) + 1
    number = torch.arange(count, device=rank.device)[:, None]  # [N, 1]
    # A block with fewer answers looks as in its first view, so that rows without several share one forward.
    shown = torch.where(number <= last[:, None], number, 0)  # [B, N, T], the rank that a view is about
    rank = rank[:, None]
    absent = real[:, None] & ((rank > shown) if rule == "as_decoded" else (rank != shown))
    if count == 1 and not bool(absent.any()):
        return views
    canvas = slice(rank.shape[-1] - views.weight.shape[-1], None)
    num_views = views.hidden.shape[1]

    def each(values: Tensor) -> Tensor:
        return values.repeat_interleave(count, dim=1)

    def again(values: Tensor) -> Tensor:
        return values.repeat(1, num_views, 1)

    return Views(
        hidden=each(views.hidden) & again((rank == shown) | ~targets[:, None]),
        weight=each(views.weight) * again(rank == number)[..., canvas],
        ids=None if views.ids is None else each(views.ids),
        targets=None if views.targets is None else each(views.targets),
        absent=again(absent),
    )
