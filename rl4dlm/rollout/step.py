"""The loop that decodes a batch of rows, one step after another: look, choose, write, take back, resize, record.

What is written when is decided by the schedule, from where a row is fed by the cache policy, who sees whom by the
model's attention kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from rl4dlm.rollout.constraints.automata import constrain
from rl4dlm.rollout.feed import Feed
from rl4dlm.rollout.record import DEAD_END, KEPT, STEP_CAP
from rl4dlm.rollout.requests import BLOCKS, FLAGGED, POLICY, completed
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.rollout.schedules.parts import BlockState, Step, best

TIMES = ("commit_step", "block_stop")


class Batch(Feed):
    """Rows that are decoded until every one of them is finished."""

    def decode(self) -> Iterator[int]:
        """Runs until every row is finished; yields how many slots each step settled, 0 unless `counts` is set."""
        self._settle()
        while len(self.slot):
            before = self.masked.sum() if self.counts else None
            self._step()
            yield self._settle(before, after_step=True)

    def _settle(self, before: Tensor | None = None, *, after_step: bool = False) -> int:
        """Rows that are finished leave, others take their places, and rows whose block is complete enter the next.

        Returns how many slots were settled since there were `before` open ones. All that the host must know of a step
        comes in one transfer.
        """
        settled, entered = 0, False
        while len(self.slot):
            finished, moved = self._finished(), self._leaving()
            flags = [finished.any(), moved.any()]
            if after_step:
                flags.append(self.broken)
            if before is not None:
                flags.append(before - self.masked.sum())
            any_finished, any_moved, *more = torch.stack(flags).tolist()
            if after_step:
                after_step = False
                if more.pop(0):
                    raise ValueError(
                        "the model's logits are not numbers (NaN) at a masked position; decoding cannot go on"
                    )
                if self.on_step is not None:
                    self.on_step(self._progress())
            if before is not None:
                settled, before = max(0, more.pop()), None
            if any_finished:
                self._retire(finished)
            elif any_moved:
                self._enter_blocks(moved)
            else:
                break
            entered = True
        if entered:
            self.masked_at_start = self._masked_at_start()
        self.reach = self._reach()
        return settled

    def _reach(self) -> Tensor:
        """How far the step may write: long `[R]`. Where that would be nowhere, it is the end of the block."""
        if self.schedule.reach is None:
            return self.stop
        at = (self.start, self.block, self.offset, self.length, self.masked, self.memory)
        ended = (self._is_end(self.tokens[:, self.width :]) & ~self.masked).any(-1)
        reach = self.schedule.reach(BlockState(*at, self.stop, self.reach, self.block_step, ended))
        reach = torch.minimum(reach, self.length)
        nowhere = ~(self.masked & (self.offsets < reach[:, None])).any(-1)
        return torch.where(nowhere, self.stop, reach)

    def _step(self) -> None:
        schedule = self.schedule
        step = self._look()
        if self.requests.complete:
            self._complete(step)
        stop = schedule.blocks.settle(step)
        if stop is not None:
            self.stop = torch.where(self.block_step == 0, torch.minimum(stop, self.length), self.stop)
            self.masked_at_start = torch.where(self.block_step == 0, self.open.sum(-1), self.masked_at_start)
            self.reach = self._reach()
            step.stop, step.reach, step.eligible = self.stop, self.reach, self.eligible
            step.masked_at_start = self.masked_at_start
        if schedule.propose is not None:
            step.drawn = schedule.propose(step)
        scores = schedule.confidence(step)
        if self.config.defer_token_ids:
            deferred = torch.isin(step.drawn.token, torch.tensor(self.config.defer_token_ids, device=scores.device))
            scores = scores.masked_fill(deferred, -torch.inf)
        eligible = step.eligible
        commit = schedule.commit(step, scores) & eligible
        capped: Tensor | None = None  # bool [R], rows that have made too many steps, and write all they may
        self.steps_made += 1 + self.config.draft_steps
        if self.steps_made > self.step_cap:  # no row can have made more
            capped = self.total_step >= self.step_cap
            self.reason = torch.where(capped, STEP_CAP, self.reason)
            commit = commit | (capped[:, None] & eligible)
        commit = self._admissible(step, scores, commit)
        replace: Tensor | None = None
        remask: Tensor | None = None
        if schedule.replace is not None:
            replace = schedule.replace(step, commit) & step.seen & step.written & ~self.locked
            replace = replace if capped is None else replace & ~capped[:, None]
        if schedule.remask is not None:
            remask = schedule.remask(step, commit) & (step.written | commit) & ~self.locked
            remask = remask if replace is None else remask & ~replace
            remask = remask if capped is None else remask & ~capped[:, None]
        gained = commit.any(-1) if remask is None else commit.sum(-1) > remask.sum(-1)
        if schedule.patience or remask is not None:
            self.stalled = torch.where(gained | ~eligible.any(-1), 0, self.stalled + 1)
            forced = self.stalled > schedule.patience
            self.stalled = torch.where(forced, 0, self.stalled)
            remask = remask if remask is None else remask & ~forced[:, None]
            forced = forced & ~commit.any(-1)
        else:
            forced = ~gained
        fallback = self._admissible(step, scores, best(scores, eligible) & forced[:, None])
        commit = commit | fallback
        self._keep(step, fallback.any(-1))
        self._write(step, commit, replace, remask)
        if schedule.edit is not None:
            self._edit(schedule.edit(step), step, capped)
        self._after(step, capped)

    def _keep(self, step: Step, fell_back: Tensor) -> None:
        """Records what is asked for of a step itself; `fell_back`: bool `[R]`."""
        names, slots = self.requests.names, self.slot + self.record.first
        found = {FLAGGED: fell_back} if FLAGGED in names else {}
        if BLOCKS in names:
            found[BLOCKS] = torch.stack([self.start, self.stop], dim=-1)
        if POLICY in names:
            found |= step.noted
        for name, values in found.items():
            self.record.answers.add(name, slots, self.total_step, values)

    def _complete(self, step: Step) -> None:
        """Records what the step would make of the whole canvas at once."""
        rows = self.requests.due(step.total_step).nonzero().squeeze(-1)
        slots, steps = (self.slot + self.record.first)[rows], step.total_step[rows]
        state = (step.tokens[rows], step.masked[rows], step.length[rows])
        for name in self.requests.readings:
            self.record.answers.add(name, slots, steps, completed(*state, step.read[name][rows], name))

    def _admissible(self, step: Step, scores: Tensor, commit: Tensor) -> Tensor:
        """What the constraint lets pass of the slots to be written; changes `step.drawn` to what is written there."""
        if self.constraint is None:
            return commit
        commit, step.drawn, dead = constrain(step, scores, commit, self.constraint)
        self.reason, self.done = torch.where(dead, DEAD_END, self.reason), self.done | dead
        return commit

    def _write(self, step: Step, commit: Tensor, replace: Tensor | None, remask: Tensor | None) -> None:
        """Records and applies what happens to slots in this step."""
        if not self.schedule.monotone:
            self._log(EventKind.COMMIT, commit, step, step.drawn.token)
            self._log(EventKind.REPLACE, replace, step, step.drawn.token)
            self._log(EventKind.REMASK, remask, step, torch.where(commit, step.drawn.token, step.tokens))
        kept = commit if replace is None else commit | replace
        canvas = torch.where(kept, step.drawn.token, step.tokens)
        self.masked = self.masked & ~commit
        if remask is not None:
            canvas = canvas.masked_fill(remask, self.spec.mask_token_id)
            self.masked, kept = self.masked | remask, kept & ~remask
        self.tokens[:, self.width :] = canvas
        values = {"commit_step": self.total_step[:, None], "block_stop": self.stop[:, None]}
        values |= {name: getattr(step.drawn, name) for name in KEPT}
        for name, value in values.items():
            before = getattr(self, name)
            value = torch.where(kept, value if name in TIMES else value.to(before.dtype), before)
            setattr(self, name, value if remask is None else value.masked_fill(remask, -1 if name in TIMES else 0.0))
        if self.schedule.draws_positions:
            slots = self.slot + self.record.first
            self.record.log.selections.append((slots, self.total_step, step.selection_log_prob))
        if step.order is not None:
            slots = self.slot + self.record.first
            self.record.log.orders.append((slots, torch.where(commit, step.order, -1)))
        self.extra_forwards = self.extra_forwards + step.extra_forwards
        self.block_step = self.block_step + 1
        self.total_step = self.total_step + 1

    def _log(self, kind: EventKind, where: Tensor | None, step: Step, tokens: Tensor) -> None:
        if where is None:
            return
        rows, columns = where.nonzero(as_tuple=True)
        if not len(rows):
            return
        numbers: dict[str, Tensor] = {}
        if kind != EventKind.REMASK:
            names = ("raw_log_prob", "log_prob", "confidence")
            numbers = {name: getattr(step.drawn, name)[rows, columns].double() for name in names}
        slots = self.slot[rows] + self.record.first
        self.record.log.add(kind, slots, step.total_step[rows], columns, tokens[rows, columns], **numbers)

    def _after(self, step: Step, capped: Tensor | None) -> None:
        """Changes of length, and whether rows stay in their block or are finished."""
        schedule = self.schedule
        if schedule.resize is None and schedule.stay is None and schedule.finish is None:
            return
        step = dataclasses.replace(step, tokens=self.tokens[:, self.width :], masked=self.masked)
        capped = torch.zeros_like(self.done) if capped is None else capped
        if schedule.stay is not None:
            self.staying = schedule.stay(step) & ~self.open.any(-1) & ~capped
        if schedule.finish is not None:
            self.done = self.done | schedule.finish(step)
        change = None if schedule.resize is None else schedule.resize(step)
        if change is not None:
            self._resize(change, step.total_step, capped)
