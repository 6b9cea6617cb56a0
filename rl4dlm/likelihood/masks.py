"""What the estimators that hide tokens behind a mask share: keyed uniform numbers, levels, subsets, views.

Owns how masks come about from keys, so that a row's views depend on nothing but (seed, row id, iteration) and the row's
own tokens. What a mask's tokens count for is each estimator's business.

Tokens behind the first end of sequence are hidden in every view of an estimator with scope `"valid"`, so that they can
change nothing; with scope `"canvas"` they are tokens like all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import SCOPES
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import position_ids
from rl4dlm.rollout.noise import keyed_uniform

STRATIFY = ("none", "views", "rows")
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 divided by the golden ratio, as int64


class RowNoise:
    """Uniform numbers in (0, 1) for the rows of a batch in an inner iteration, float64.

    `purpose` names a stream; streams are independent of each other.
    """

    def __init__(self, rows: Rows, seed: int, iteration: int) -> None:
        self.rows, self.seed = rows, seed
        self.iteration = torch.tensor(iteration, device=rows.row_ids.device)

    def per_row(self, purpose: str) -> Tensor:
        """`[B]`."""
        return keyed_uniform(self.seed, purpose, self.rows.row_ids, self.iteration)

    def per_view(self, purpose: str, views: int) -> Tensor:
        """`[B, views]`."""
        return keyed_uniform(self.seed, purpose, self.rows.row_ids[:, None], self.iteration, self._range(views))

    def per_token(self, purpose: str, views: int) -> Tensor:
        """`[B, views, L]`, for canvas tokens."""
        offset = self._range(self.rows.canvas_ids.shape[1])
        return self._of_tokens(purpose, views, offset)

    def per_prompt_token(self, purpose: str, views: int) -> Tensor:
        """`[B, views, P]`. Positions count from the first real token, so that padding changes nothing."""
        return self._of_tokens(purpose, views, position_ids(self.rows.prompt_mask)[:, None])

    def spread(self, purpose: str, views: int, stratify: str) -> Tensor:
        """`[B, views]`, each one uniform, and together evenly spread over (0, 1).

        `"views"`: those of a row are 1 / views apart, from a start of its own. `"rows"`: the starts of rows are spread,
        too, a golden ratio apart in the order of their ids, so that a row still does not depend on its batch mates.
        `"none"`: all are independent.
        """
        if stratify == "none":
            return self.per_view(purpose, views)
        if stratify == "views":
            start = self.per_row(purpose)
        else:
            place = ((self.rows.row_ids * _GOLDEN) >> 11) & (2**53 - 1)
            start = keyed_uniform(self.seed, purpose, self.iteration) + place.double() * 2.0**-53
        return (start[:, None] + self._range(views) / views) % 1

    def spread_in_blocks(self, purpose: str, views: int, blocks: int, stratify: str) -> Tensor:
        """`[B, views, blocks]`: for each block as `spread`, and those of a view spread over its blocks, too.

        With `"none"` all are independent. A block's numbers depend on its place, not on how many there are.
        """
        if stratify == "none":
            row, view = self.rows.row_ids[:, None, None], self._range(views)[:, None]
            return keyed_uniform(self.seed, purpose, row, self.iteration, view, self._range(blocks))
        apart = ((self._range(blocks) * _GOLDEN) >> 11) & (2**53 - 1)
        return (self.spread(purpose, views, stratify)[..., None] + apart.double() * 2.0**-53) % 1

    def _of_tokens(self, purpose: str, views: int, position: Tensor) -> Tensor:
        row, view = self.rows.row_ids[:, None, None], self._range(views)[:, None]
        return keyed_uniform(self.seed, purpose, row, self.iteration, view, position)

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.rows.row_ids.device)


def in_scope(rows: Rows, scope: str) -> Tensor:
    """bool `[B, L]`, the canvas tokens that an estimator is about."""
    return rows.valid if scope == "valid" else torch.ones_like(rows.valid)


def subset(uniform: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """A uniformly random subset of `count` (long, at least 0) of the eligible tokens: those of the lowest numbers.

    All broadcast to `[..., L]`; all eligible tokens where there are fewer.
    """
    keys = uniform.masked_fill(~eligible, torch.inf)
    rank = keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return (rank < count) & eligible


def subset_of_blocks(uniform: Tensor, eligible: Tensor, block: Tensor, count: Tensor) -> Tensor:
    """Of the eligible tokens of each block a uniformly random subset of `count`: `subset` for each block.

    Args:
        uniform: `[B, K, L]` in (0, 1). eligible: bool `[B, L]`.
        block: long `[B, L]`, each token's block, from 0 on and never falling.
        count: long `[B, K, N]`, for each of N blocks.
    """
    keys = (block[:, None] + uniform).masked_fill(~eligible[:, None], torch.inf)
    rank = keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)  # block after block
    size = of_blocks(eligible, block, count.shape[-1])  # [B, N]
    first = (size.cumsum(-1) - size).gather(-1, block)[:, None]
    return (rank - first < count.gather(-1, block[:, None].expand_as(rank))) & eligible[:, None]


def of_blocks(mask: Tensor, block: Tensor, blocks: int) -> Tensor:
    """How many tokens of a mask (bool `[..., L]`) are in each block, long `[..., N]`; `block` is long `[..., L]`."""
    return mask.new_zeros(*mask.shape[:-1], blocks, dtype=torch.long).scatter_add_(-1, block, mask.long())


def blocks_of(rows: Rows, block_length: int, origin: str) -> Tensor:
    """The block of each canvas token, long `[B, L]`, from 0 on: those of the attention's grid (`DiffusionSpec`).

    With origin `"position_zero"` a prompt that does not end on the grid makes the first one shorter.
    """
    offset = torch.arange(rows.canvas_ids.shape[1], device=rows.canvas_ids.device)
    if origin != "position_zero":
        return (offset // block_length).expand(len(rows), -1)
    within = rows.prompt_mask.sum(-1, keepdim=True) % block_length  # of the first block, in the prompt
    return (within + offset) // block_length


def count_of(level: Tensor, least: int, most: Tensor) -> Tensor:
    """A uniform number on `least..most` (long) from a uniform one in [0, 1)."""
    return ((level * (most - least + 1)).long() + least).minimum(most.clamp(min=least))


def as_views(rows: Rows, hidden: Tensor, weight: Tensor, scope: str, prompt: Tensor | None = None) -> Views:
    """Views that hide canvas tokens (bool `[B, K, L]`), those out of scope, and prompt tokens (bool `[B, K, P]`)."""
    hidden = hidden | ~in_scope(rows, scope)[:, None]
    if prompt is None:
        prompt = hidden.new_zeros(*hidden.shape[:2], rows.prompt_ids.shape[1])
    return Views(torch.cat([prompt, hidden], dim=-1), weight)


# --- settings ---------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among the `allowed` ones: a `ValueError` that names them, like all checks here."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed; choose one of {', '.join(allowed)}")


def check_scope(scope: str) -> None:
    """Refuses an unknown scope."""
    check_choice("scope", scope, SCOPES)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuses what is not an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, {least} or larger")


def check_share(name: str, value: float) -> None:
    """Refuses a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not allowed; it must be between 0 and 1")


def check_range(name: str, value: tuple[float, float]) -> None:
    """Refuses what is not an interval within [0, 1]."""
    if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"{name}={value!r} is not allowed; it must be two numbers, 0 <= low <= high <= 1")
