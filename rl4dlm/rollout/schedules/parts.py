"""What schedules are made of: small functions over rows, none of which reads another row.

A schedule has a block policy (where it may write), a confidence (which candidates are good) and a commit rule (which of
them are written now). Some also take tokens back, replace them, change the length of the canvas, look at more of the
logits or feed something else than tokens; each is a part of its own. The engine owns the order of things, the eligible
set and progress: it never commits outside the eligible set, never touches a slot that was given, and writes the best
candidate of a row whose rules would not get on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Drawn, Reading, Transform
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.ranking import best as best, ranks as ranks, top as top

KEPT_BY_CHECK = "kept_by_check"
RATIO = "ratio"
"""What a second forward says of drafts, in `Step.read`; see `Schedule.verify`."""

Scope = Literal["eligible", "masked", "block", "canvas"]
"""Which slots a step draws candidates for and reads: the masked ones that may be written (up to the end of the active
block, or to the schedule's reach), all masked ones, the first and the written ones of the block, or all there are."""


@dataclass
class Step:
    """All rows at one step, as a schedule sees them. R rows, canvases of W slots; everything is per row.

    Args:
        tokens: long `[R, W]`, the canvas before this step; the mask token where nothing is written.
        masked: bool `[R, W]`, slots that are not written. locked: bool `[R, W]`, slots that were given, never changed.
        length: long `[R]`, slots of each row; what lies behind does not exist.
        start: long `[R]`, first slot of the active block. stop: long `[R]`, the one behind its last.
        block: long `[R]`, its number, from 0.
        reach: long `[R]`, the slot behind the last one that may be written; `stop` unless the schedule has a rule.
        eligible: bool `[R, W]`, masked slots before `reach`: what may be written now.
        seen: bool `[R, W]`, slots that have a candidate; `drawn` and `read` are undefined elsewhere.
        drawn: candidates, tensors `[R, W]`.
        read: what the schedule's `reads` gave, by name, `[R, W, ...]`.
        step: long `[R]`, steps already made in this block. total_step: long `[R]`, steps already made in all.
        masked_at_start: long `[R]`, masked slots before `stop` when the block was entered.
        prompts: token ids of each row's prompt, without padding.
        row_ids: long `[R]`. noise: keyed by row id, step and position.
        memory: what parts remember of these rows; parts write into it.
        mask_token_id, eos_token_ids: of the model.
        selection_log_prob: `[R]`, for parts that draw positions to add the log-probability of their draw to.
        extra_forwards: long `[R]`, for parts that run another model to count its forwards in.
        order: long `[R, W]`, for parts that choose slots one after another to put their places in: from 0 in each row,
            -1 elsewhere. None: there is no such order.
        noted: what a policy saw and chose, for the record; parts put it there (`rl4dlm.rollout.requests`).
    """

    tokens: Tensor
    masked: Tensor
    locked: Tensor
    length: Tensor
    start: Tensor
    stop: Tensor
    block: Tensor
    reach: Tensor
    eligible: Tensor
    seen: Tensor
    drawn: Drawn
    read: Mapping[str, Tensor]
    step: Tensor
    total_step: Tensor
    masked_at_start: Tensor
    prompts: list[list[int]]
    row_ids: Tensor
    noise: NoiseSource
    memory: Memory
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    selection_log_prob: Tensor
    extra_forwards: Tensor
    order: Tensor | None = None
    noted: dict[str, Tensor] = field(default_factory=dict)

    @property
    def offsets(self) -> Tensor:
        """long `[W]`, canvas offsets."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def inside(self) -> Tensor:
        """bool `[R, W]`, slots of the active block."""
        return (self.offsets >= self.start[:, None]) & (self.offsets < self.stop[:, None])

    @property
    def written(self) -> Tensor:
        """bool `[R, W]`, slots that hold a token, given ones included."""
        return ~self.masked & (self.offsets < self.length[:, None])

    def is_eos(self, tokens: Tensor) -> Tensor:
        """Where a tensor of ids holds an end-of-sequence token; bool of its shape."""
        return torch.isin(tokens, torch.tensor(self.eos_token_ids, dtype=tokens.dtype, device=tokens.device))

    def uniform(self, purpose: str, where: Tensor | None = None) -> Tensor:
        """Uniform numbers in (0, 1), float64 `[R, W]`, keyed by row id, the row's step and the slot.

        Args:
            purpose: streams of different purposes are independent.
            where: bool `[R, W]`, slots that need one, 0 elsewhere; None: all.
        """
        where = torch.ones_like(self.masked) if where is None else where
        return keyed_uniform(self.noise, purpose, self.row_ids, self.total_step, where)


def keyed_uniform(noise: NoiseSource, purpose: str, row_ids: Tensor, steps: Tensor, where: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) at slots `where`, bool `[R, W]`, 0 elsewhere; float64 `[R, W]`."""
    rows, slots = where.nonzero(as_tuple=True)
    drawn = noise.uniform(purpose, row_ids[rows], steps[rows], slots)
    return torch.zeros(where.shape, dtype=drawn.dtype, device=drawn.device).index_put((rows, slots), drawn)


@dataclass(frozen=True)
class Ahead:
    """What is known of a step before its forward. All but `noise` are as in `Step`."""

    eligible: Tensor
    step: Tensor
    total_step: Tensor
    masked_at_start: Tensor
    row_ids: Tensor
    noise: NoiseSource


@dataclass(frozen=True)
class BlockStart:
    """Rows that begin a block, as a block policy sees them.

    Args:
        start: long `[R]`, the first slot of the block. block: long `[R]`, its number, from 0.
        offset: long `[R]`, prompt tokens that lie in the same block of the model's attention as the first slot.
        length: long `[R]`, slots of each row.
        masked: bool `[R, W]`.
        memory: of these rows.
    """

    start: Tensor
    block: Tensor
    offset: Tensor
    length: Tensor
    masked: Tensor
    memory: Memory


class BlockPolicy(Protocol):
    """Decides where blocks end. Each starts where the one before ended, the first at slot 0."""

    @property
    def on_grid(self) -> bool:
        """Whether the blocks are those of a fixed grid, as models need whose attention has blocks."""
        ...

    def end(self, rows: BlockStart) -> Tensor:
        """The slot behind the last one of the block: long `[R]`, larger than `start`. Called for all rows; it counts
        for those that begin a block."""
        ...

    def settle(self, step: Step) -> Tensor | None:
        """A new end, long `[R]`, once the candidates of a block's first step are known (`step.step == 0`; it counts
        for those rows only); None leaves all as they are."""
        ...


@dataclass(frozen=True)
class BlockState(BlockStart):
    """Rows on their way into a step, as a reach sees them.

    Args:
        stop: long `[R]`, the slot behind the last one of the active block.
        reach: long `[R]`, that of the step before, 0 before the first.
        step: long `[R]`, steps already made in this block.
        ended: bool `[R]`, whether an end of sequence is written anywhere.
    """

    stop: Tensor
    reach: Tensor
    step: Tensor
    ended: Tensor


ReachRule = Callable[[BlockState], Tensor]
"""From rows before a step to the slot behind the last one that the step may write: long `[R]`. It may lie inside the
active block or behind it, where the blocks that follow are then open too."""

Confidence = Callable[[Step], Tensor]
"""Scores `[R, W]`; higher is written earlier."""

CommitRule = Callable[[Step, Tensor], Tensor]
"""From the step and the scores to bool `[R, W]`: slots that are written now. Only eligible ones count."""

RemaskRule = Callable[[Step, Tensor], Tensor]
"""From the step and what it commits, bool `[R, W]`, to bool `[R, W]`: slots that are masked again after that, whether
written in this step or earlier. Only written slots that were not given count."""

ReplaceRule = Callable[[Step, Tensor], Tensor]
"""From the step and what it commits to bool `[R, W]`: written slots that take their candidate instead of their token.
Only slots in `step.seen` that were not given count."""

RowRule = Callable[[Step], Tensor]
"""From the step to bool `[R]`."""

Foresight = Callable[[Ahead], Tensor]
"""From what is known before a step to long `[R, W]`: the order, from 0, of the slots that it writes; -1 elsewhere."""

SoftInput = Callable[["CanvasInput"], Tensor]
"""From the canvas as it is about to be fed to its input embeddings `[R, W, D]`."""


@dataclass(frozen=True)
class CanvasInput:
    """A canvas on its way into the model.

    Args:
        embeddings: `[R, W, D]`, of its tokens. masked: bool `[R, W]`.
        total_step: long `[R]`, steps already made. memory: of these rows.
    """

    embeddings: Tensor
    masked: Tensor
    total_step: Tensor
    memory: Memory


@dataclass(frozen=True)
class Resize:
    """A change of length after a step: first slots are put in, then what exceeds a length is cut off.

    Args:
        at: long `[R]`, slots go in before this one; `length` appends.
        count: long `[R]`, how many, 0 for none.
        token: long `[R]`, what they hold; the mask token leaves them open, anything else counts as given.
        limit: long `[R]`, the largest length afterwards.
    """

    at: Tensor
    count: Tensor
    token: Tensor
    limit: Tensor


@dataclass(frozen=True)
class Edits:
    """Slots of the active block that come and go after a step; the block keeps its length. bool `[R, W]`.

    Args:
        delete: taken out; the block gets an open slot at its end instead.
        insert: an open slot goes in before them; what then stands behind the block's end is cut off.
    """

    delete: Tensor
    insert: Tensor


@dataclass(frozen=True)
class Schedule:
    """The parts of a schedule. What is None is not done.

    Args:
        blocks: where blocks end. confidence: which candidates are good. commit: which are written.
        propose: other candidates than those drawn, before anything else looks at them.
        replace: which written tokens take their candidate. remask: which slots are masked again.
        resize: how the canvas changes its length. edit: which slots of the block come and go.
        stay: rows that make another step in their block though nothing in it is masked.
        verify: rows whose drafts are checked from left to right by a second forward (`rl4dlm.rollout.verifying`),
            before anything is written; `read[KEPT_BY_CHECK]`, bool `[R, W]`, has what passed and what took the place of
            the first that did not, and `read[RATIO]` the ratios, -1 elsewhere.
        finish: rows that are finished now, whatever is still masked; open slots count as behind the end.
        reach: how far a step may write, where that is not the end of the active block.
        upcoming: which slots the step will write, where that does not depend on its candidates.
        ahead: that may lie behind the active block, so that blocks are written whose predecessors are unfinished.
        scope: slots that candidates are drawn for.
        reads: more to be had from the logits of these slots, by name.
        transform: changes logits before candidates are drawn.
        inputs: what is fed in place of the canvas's embeddings.
        shadow: the active block is also fed as a copy of mask tokens, each of which sees all but the slot it stands
            for; `read["shadow"]` is then the log-probability there of the token now held, `[R, W]`, in written slots of
            the block.
        patience: steps in a row that a row may spend without more slots being written than before; after that the
            engine writes its best candidate and takes nothing back.
        start_length: slots that a row starts with; None: all of the canvas.
        reopens: the rules take back slots of earlier blocks too.
        memoryless: no part remembers anything between steps or adds to what a step records, so that what a step does
            follows from the row as it is before it; steps can then be guessed ahead (`draft_steps`).
        reads_entropy: some part looks at `step.drawn.entropy`, which is NaN else if the record does not keep it either.
        reads_states: `read["states"]` has the last hidden state of each slot of the canvas, `[R, W, D]`, that which its
            token is predicted from.
        draws_positions: some part adds to `step.selection_log_prob`; else that is not recorded.
        policy: the network that decides, where one does; what it sees and chooses is then in `step.noted`.
        check: raises ValueError for a denoiser that the parts cannot work with; called before decoding.
    """

    blocks: BlockPolicy
    confidence: Confidence
    commit: CommitRule
    propose: Callable[[Step], Drawn] | None = None
    replace: ReplaceRule | None = None
    remask: RemaskRule | None = None
    resize: Callable[[Step], Resize | None] | None = None
    edit: Callable[[Step], Edits] | None = None
    stay: RowRule | None = None
    verify: RowRule | None = None
    finish: RowRule | None = None
    reach: ReachRule | None = None
    ahead: bool = False
    upcoming: Foresight | None = None
    scope: Scope = "eligible"
    reads: Mapping[str, Reading] = field(default_factory=dict)
    transform: Transform | None = None
    inputs: SoftInput | None = None
    shadow: bool = False
    patience: int = 0
    start_length: int | None = None
    reopens: bool = False
    draws_positions: bool = False
    policy: Any = None
    memoryless: bool = False
    reads_entropy: bool = False
    reads_states: bool = False
    check: Callable[[Any], None] | None = None

    @property
    def monotone(self) -> bool:
        """Whether each slot is written once and for good, so that the steps of commitment say everything."""
        return self.replace is None and self.remask is None and not self.moves

    @property
    def moves(self) -> bool:
        """Whether slots come and go, so that nothing can be said about a slot by its place."""
        return self.resize is not None or self.edit is not None

    @property
    def whole(self) -> bool:
        """Whether every step needs a forward of the whole row, which rules out caches."""
        return (
            self.reopens
            or self.shadow
            or self.inputs is not None
            or self.reads_states
            or self.resize is not None
            or self.scope in ("masked", "canvas")
        )


@dataclass(frozen=True)
class FixedBlocks:
    """Blocks of equal length. The last one, and a first one that started in the prompt, are shorter.

    Args:
        block_length: of a whole block.
    """

    block_length: int
    on_grid: bool = True

    def end(self, rows: BlockStart) -> Tensor:
        grid = (rows.start + rows.offset).div(self.block_length, rounding_mode="floor") + 1
        return torch.minimum(grid * self.block_length - rows.offset, rows.length)

    def settle(self, step: Step) -> Tensor | None:
        return None


@dataclass(frozen=True)
class CanvasSchedule:
    """The parts of a schedule that refines whole canvases of random tokens, any of which may change at any step.

    Args:
        max_steps: N, after which a canvas is finished whatever its state.
        temperature: of a step, from the steps n that remain with it, N to 1.
        accept: from entropies `[R, C]` in nats to bool `[R, C]`, the candidates that are kept until the next step.
        stability: steps for which the most probable tokens must have stayed the same before a canvas is finished.
        confidence: mean entropy in nats below which they must be.
    """

    max_steps: int
    temperature: Callable[[int], float]
    accept: Callable[[Tensor], Tensor]
    stability: int
    confidence: float


def probability(step: Step) -> Tensor:
    """The candidate's untempered probability (low-confidence remasking keeps the most confident)."""
    return step.drawn.confidence


def first_run(eligible: Tensor) -> Tensor:
    """bool `[R, W]`: of eligible slots the first, and those that follow it without a gap."""
    begun = eligible.cumsum(-1) > 0
    return eligible & ((begun & ~eligible).cumsum(-1) == 0)


def random_order(step: Step) -> Tensor:
    """Uniform scores: positions are written in random order."""
    return step.uniform("order", step.eligible)


def even_counts(masked: Tensor, steps: int, step: Tensor) -> Tensor:
    """How many tokens an even schedule writes at a step: `masked` shared out over `steps`, the rest on the first ones.

    Args:
        masked: long `[R]`. steps: number of steps S. step: long `[R]`, from 0.

    Returns:
        long `[R]`: `masked // S`, one more while `step < masked % S` (LLaDA, arXiv 2502.09992).
    """
    return masked // steps + (step < masked % steps).long()


def even_top(steps: int) -> CommitRule:
    """Commits the best positions, an even number at each of `steps` steps per block."""

    def rule(step: Step, scores: Tensor) -> Tensor:
        return top(scores, step.eligible, even_counts(step.masked_at_start, steps, step.step))

    return rule


def foreseen(scores: Callable[[Ahead], Tensor], steps: int) -> Foresight:
    """What `even_top(steps)` commits by scores that do not depend on candidates."""

    def rule(ahead: Ahead) -> Tensor:
        place = ranks(scores(ahead), ahead.eligible)
        counts = even_counts(ahead.masked_at_start, steps, ahead.step)
        return torch.where(ahead.eligible & (place < counts[:, None]), place, -1)

    return rule


def above(threshold: float) -> CommitRule:
    """Commits every position whose score reaches the threshold."""
    return lambda step, scores: scores >= threshold
