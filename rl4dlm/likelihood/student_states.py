"""States that a student is asked about, and the views of a teacher who sees more of the same sequence.

A state hides some tokens of a finished completion. Which ones, and which of them count, is what few-step distillation
methods differ in (SDTT arXiv 2410.21035, d3LLM arXiv 2601.07568, dParallel, T3D, D2F arXiv 2508.09192, d-OPSD):

- `random`: a random subset; of the whole completion, of every block, or of one block, behind which all is hidden and
  before which all is shown, as in block-wise decoding (dParallel).
- `recorded`: a state that the completion went through while it was decoded: what was written from some step on is
  hidden (d-OPSD; of one block: d3LLM; of every block of a model that denoises block by block: T3D).
- `rising`: independent tokens with a share for each block that never falls from block to block, as in a pipeline of
  several open blocks (D2F).

Owns the draws. A teacher's distributions at these positions are the trainer's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import (
    RowNoise,
    as_views,
    blocks_of,
    check_choice,
    check_count,
    check_range,
    check_scope,
    in_scope,
    of_blocks,
    subset,
    subset_of_blocks,
)
from rl4dlm.likelihood.steps import dense
from rl4dlm.likelihood.views import Rows, Views

STATES = ("random", "recorded", "rising")
POSITIONS = ("hidden", "next", "surest")
RISE = 0.7
"""The most that the share of a block is above that of the block before it, in D2F's code."""


@dataclass(frozen=True)
class StudentStates(Estimator):
    """K states of each row; what counts has weight 1.

    Args:
        num_views: K; even with complements.
        states: one of `STATES`.
        share_range: of the tokens in question (the completion's, or a block's), the share that is hidden; one token at
            least. With `rising` the share of the first block.
        shares: these shares alone, in the place of a range; the n-th power of a share is its weight.
        exponent: n; 0: all of them are as likely.
        block_length: of one random block instead of the whole completion; of the blocks of `rising`. None: there are
            none.
        every_block: hide the same share of every block, and not of one.
        positions: what counts: all that is `"hidden"`, or with recorded states what the `"next"` step wrote. `"surest"`
            is as hidden here: which of them a teacher is surest of is not known yet.
        complement: states come in pairs that hide complementary tokens; a second one that would hide nothing hides what
            the first does.
        scope: `"valid"` tokens or the whole `"canvas"`.
        block_origin: where blocks start; see `DiffusionSpec`.

    Raises:
        ValueError: names the setting, the value and what is allowed; in `draw`, recorded states of rows without a
            record.
    """

    num_views: int = 1
    states: str = "random"
    share_range: tuple[float, float] = (0.0, 1.0)
    shares: tuple[float, ...] | None = None
    exponent: float = 0.0
    block_length: int | None = None
    every_block: bool = False
    positions: str = "hidden"
    complement: bool = False
    scope: str = "valid"
    block_origin: str = "response"

    reweighted = True

    def __post_init__(self) -> None:
        check_count("num_views", self.num_views)
        check_choice("states", self.states, STATES)
        check_range("share_range", self.share_range)
        if self.shares is not None and not (self.shares and all(0 < share <= 1 for share in self.shares)):
            raise ValueError(f"shares={list(self.shares)} is not allowed; needed: numbers larger than 0 and at most 1")
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"shares_exponent={self.exponent} is not allowed; it must be 0 or larger, and finite")
        check_choice("positions", self.positions, POSITIONS)
        check_scope(self.scope)
        if self.every_block and (self.block_length is None or self.states == "rising"):
            raise ValueError(
                f"every_block=True is not allowed with block_length={self.block_length} and states={self.states!r}: "
                "it hides the same share of every block; give their length, and choose random or recorded"
            )
        if self.block_length is not None:
            check_count("block_length", self.block_length)
        if self.complement and self.num_views % 2:
            raise ValueError(f"num_views={self.num_views} is not allowed with complement=True; it must be even")
        if self.states == "rising" and self.block_length is None:
            raise ValueError("states='rising' needs blocks, whose shares rise: give their length")
        if self.states == "rising" and self.complement:
            raise ValueError("complement=True is not allowed with states='rising': shares of the others would fall")
        if self.positions == "next" and (self.states != "recorded" or self.complement):
            raise ValueError(
                f"positions='next' is not allowed with states={self.states!r} and complement={self.complement}: only "
                "recorded states have a next step; choose hidden"
            )

    @property
    def reads_record(self) -> bool:  # type: ignore[override]
        return self.states == "recorded"

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views; with complements, those of a pair follow each other."""
        noise = RowNoise(rows, seed, iteration)
        draws = self.num_views // 2 if self.complement else self.num_views
        uniform = noise.per_token("student mask", draws)  # [B, J, L]
        share = self._share(noise.spread("student share", draws, "views"))  # [B, J]
        within = in_scope(rows, self.scope)
        if rows.given is not None:
            within = within & ~rows.given
        own, later = self._tokens(rows, within, noise.per_view("student block", draws))
        count = (share * own.sum(-1)).ceil().long().clamp(min=1)[..., None]  # [B, J, 1]
        if self.states == "rising":
            assert self.block_length is not None
            shares = self.rising_shares(share, noise.per_token("student rise", draws))
            block = blocks_of(rows, self.block_length, self.block_origin)[:, None].expand_as(uniform)
            hidden = (uniform < shares.gather(-1, block)) & own
        elif self.states == "random":
            hidden = (
                self._of_every_block(rows, within, uniform, share) if self.every_block else subset(uniform, own, count)
            )
        else:
            if rows.commit_step is None:
                raise ValueError("recorded states are needed: commit_step of the rows is None")
            step = dense(rows.commit_step, rows.commit_step >= 0)[:, None].expand_as(uniform)
            if self.every_block:
                first = self._first_of_every_block(rows, within, step, share)
            else:
                last = step.masked_fill(~own, -1).sort(dim=-1, descending=True).values
                first = last.gather(-1, (count - 1).minimum(own.sum(-1, keepdim=True).clamp(min=1) - 1))
            hidden = own & (step >= first) & (step >= 0)
        scored = hidden
        if self.positions == "next":
            scored = hidden & (step == first)
        if self.complement:
            other = own & ~hidden
            other = torch.where(other.any(-1, keepdim=True), other, hidden)
            hidden = torch.stack([hidden, other], dim=2).flatten(1, 2)
            later, scored = later.repeat_interleave(2, dim=1), hidden
        return as_views(rows, hidden | later, scored.double(), self.scope)

    def _tokens(self, rows: Rows, within: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that may be hidden and scored, and those behind them that are hidden in any case, bool `[B, J, L]`."""
        everything = within[:, None].expand(-1, uniform.shape[1], -1)
        if self.block_length is None or self.every_block or self.states == "rising":
            return everything, torch.zeros_like(everything)
        block = dense(blocks_of(rows, self.block_length, self.block_origin), within)  # -1 where not within
        chosen = (uniform * (1 + block.amax(-1, keepdim=True))).long()[..., None]  # [B, J, 1]
        return block[:, None] == chosen, block[:, None] > chosen

    def _share(self, level: Tensor) -> Tensor:
        """The share that a uniform number in (0, 1) stands for."""
        if self.shares is None:
            low, high = self.share_range
            return low + (high - low) * level
        allowed = level.new_tensor(self.shares)
        up_to = (allowed**self.exponent).cumsum(0)
        return allowed[torch.searchsorted(up_to[:-1] / up_to[-1], level)]

    def _counts(self, rows: Rows, within: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's block `[B, L]`, how many tokens a block has `[B, N]`, and how many a share is `[B, J, N]`."""
        assert self.block_length is not None
        most = (rows.canvas_ids.shape[1] + 2 * self.block_length - 2) // self.block_length
        block = blocks_of(rows, self.block_length, self.block_origin)
        size = of_blocks(within, block, most)
        return block, size, (share[..., None] * size[:, None]).ceil().long().clamp(min=1)

    def _of_every_block(self, rows: Rows, within: Tensor, uniform: Tensor, share: Tensor) -> Tensor:
        block, _, count = self._counts(rows, within, share)
        return subset_of_blocks(uniform, within, block, count)

    def _first_of_every_block(self, rows: Rows, within: Tensor, step: Tensor, share: Tensor) -> Tensor:
        """For each token, the first step of its block whose tokens are hidden, long `[B, J, L]`."""
        block, size, count = self._counts(rows, within, share)
        steps = int(step.max()) + 2
        order = (block * steps + (steps - 2 - step[:, 0])).masked_fill(~within, torch.iinfo(torch.long).max)
        last = order.sort(dim=-1).values[:, None].expand_as(step)  # of each block the latest first
        place = (size.cumsum(-1) - size)[:, None] + count.minimum(size[:, None]).clamp(min=1) - 1
        found = last.gather(-1, place.clamp(max=step.shape[-1] - 1)).gather(-1, block[:, None].expand_as(step))
        return steps - 2 - (found - block[:, None] * steps)

    def rising_shares(self, first: Tensor, uniform: Tensor) -> Tensor:
        """Shares `[B, J, N]` of blocks that never fall, from that of the first, `[B, J]`, and uniform numbers."""
        found = [first]
        for block in range(1, uniform.shape[-1]):
            ceiling = (found[-1] + RISE).clamp(max=1.0)
            found.append(found[-1] + (ceiling - found[-1]) * uniform[..., block])
        return torch.stack(found, dim=-1)


TEACHER_VIEWS = ("same", "suffix", "subset", "later")


def teacher_views(
    views: Views, rows: Rows, noise: RowNoise, kind: str, share_range: tuple[float, float], block_length: int | None
) -> Views:
    """The views of a teacher at the positions that `views` score.

    Args:
        views: the student's. rows: they are views of these.
        noise: keys what is shown; the same for the same rows and iteration.
        kind: `"same"`; `"suffix"`: a share of what is hidden behind the next block's start is shown, which is the
            model's own answer (d-OPSD); `"subset"`: a share of what the student does not see is hidden, the rest shown
            (CD4LM). `"later"` begins as `"same"`.
        share_range: of those.
        block_length: of `"suffix"`: the next block is the one behind that of the first hidden token; None: there is one
            block, and nothing behind it.
    """
    if kind in ("same", "later"):
        return views
    length = views.weight.shape[2]
    hidden = views.hidden[..., -length:]  # [B, K, L]
    own = hidden & rows.valid[:, None] if kind == "suffix" else hidden
    low, high = share_range
    share = low + (high - low) * noise.per_view("teacher share", hidden.shape[1])
    uniform = noise.per_token("teacher mask", hidden.shape[1])
    if kind == "suffix":
        place = torch.arange(length, device=hidden.device)
        first = own.long().argmax(-1, keepdim=True)  # [B, K, 1]
        size = block_length or length
        own = own & (place >= (first // size + 1) * size)
        shown = subset(uniform, own, (share * own.sum(-1)).ceil().long()[..., None])
    else:
        kept = subset(uniform, own, (share * own.sum(-1)).ceil().long()[..., None])
        shown = own & ~kept
    canvas = hidden & ~shown
    return replace(views, hidden=torch.cat([views.hidden[..., :-length], canvas], dim=-1))
