"""Several forwards of a model inside one call of it, each computed again in the backward pass.

Owns how rows and what is asked of them are shared out over the forwards; a forward is `scoring.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rl4dlm.models.distributions import PositionReduction
from rl4dlm.models.reductions import ChosenScores, TokenScores, ValuedScores
from rl4dlm.models.spec import DiffusionSpec


def score_in_turn(
    score: Callable[..., tuple[Tensor, ...]],
    model: Any,
    spec: DiffusionSpec,
    turns: int,
    input_ids: Tensor,
    *args: Any,
    score_positions: Tensor,
    score_reduce: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """`score` in forwards of every `turns`-th row; their results in the order of one forward.

    Raises:
        ValueError: positional arguments, tokens to be scored as next tokens, a reduction that cannot be picked from, or
            rows that cannot be shared out.
    """
    fits = score_reduce is None or isinstance(score_reduce, PositionReduction)
    if args or kwargs.get("score_next_tokens") is not None or not fits:
        raise ValueError(
            "score_in_turn takes keyword arguments, and neither score_next_tokens nor a score_reduce that is no "
            "PositionReduction"
        )
    if len(score_positions) % turns:
        raise ValueError(f"score_in_turn={turns} does not divide {len(score_positions)} rows")
    rows = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.dim()}
    rest = {name: value for name, value in kwargs.items() if name not in rows}
    rows["input_ids"] = input_ids
    row = score_positions.nonzero(as_tuple=True)[0]  # [n]
    shared = rows.pop("score_rows", None)
    ends: list[int] = []
    if shared is not None:  # [N / turns or 2 N / turns, turns]
        shared = shared.view(-1, turns)
        ends = [0, *(shared.amax(0) + 1).tolist()]
    parts, places = [], []
    for turn in range(turns):
        if shared is None:
            chosen: dict[str, Any] = {name: value[turn::turns] for name, value in rows.items()}
        else:
            fed = slice(ends[turn], ends[turn + 1])
            asked = ("score_targets", "score_order", "score_flags", "score_time")
            chosen = {name: value[turn::turns] if name in asked else value[fed] for name, value in rows.items()}
            chosen["score_rows"] = shared[:, turn] - ends[turn]
        positions = score_positions[turn::turns]
        place = (row % turns == turn).nonzero().squeeze(-1)
        if score_reduce is not None:
            chosen["score_reduce"] = score_reduce.picked(place)

        def forward(chosen: dict[str, Any] = chosen, positions: Tensor = positions) -> tuple[Tensor, ...]:
            return tuple(score(model, spec, **chosen, score_positions=positions, **rest))

        recompute = torch.is_grad_enabled()
        parts.append(checkpoint(forward, use_reentrant=False) if recompute else forward())
        places.append(place)
    order = torch.cat(places).argsort()
    columns = [torch.cat(column)[order] for column in zip(*parts, strict=True)]
    if score_reduce is not None:
        return tuple(columns)
    if "score_order" in rows:
        return ChosenScores(*columns)
    return ValuedScores(*columns) if rest.get("score_values") else TokenScores(*columns)
