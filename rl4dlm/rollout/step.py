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
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.rollout.schedules.parts import BlockState, Step, top


class Batch(Feed):
    """Rows that are decoded until every one of them is finished."""

    def decode(self) -> Iterator[int]:
        """Runs until every row is finished; yields how many slots each step settled."""
        self._settle()
        while len(self.slot):
            before = self.masked.sum()
            self._step()
            settled, broken = torch.stack([before - self.masked.sum(), self.broken.long()]).tolist()
            if broken:
                raise ValueError("the model's logits are not numbers (NaN) at a masked position; decoding cannot go on")
            if self.on_step is not None:
                self.on_step(self._progress())
            self._settle()
            yield max(0, settled)

    def _settle(self) -> None:
        """Rows that are finished leave, others take their places, and rows whose block is complete enter the next."""
        while len(self.slot):
            finished, moved = self._finished(), self._leaving()
            any_finished, any_moved = torch.stack([finished.any(), moved.any()]).tolist()
            if any_finished:
                self._retire(finished)
            elif any_moved:
                self._enter_blocks(moved)
            else:
                break
        self.masked_at_start = torch.where(self.block_step == 0, self.open.sum(-1), self.masked_at_start)
        self.reach = self._reach()

    def _reach(self) -> Tensor:
        """How far the step may write: long `[R]`. Where that would be nowhere, it is the end of the block."""
        if self.schedule.reach is None:
            return self.stop
        at = (self.start, self.block, self.offset, self.length, self.masked, self.memory)
        ends = torch.tensor(self.spec.eos_token_ids, dtype=self.tokens.dtype, device=self.tokens.device)
        ended = (torch.isin(self.tokens[:, self.width :], ends) & ~self.masked).any(-1)
        reach = self.schedule.reach(BlockState(*at, self.stop, self.reach, self.block_step, ended))
        reach = torch.minimum(reach, self.length)
        nowhere = ~(self.masked & (self.offsets < reach[:, None])).any(-1)
        return torch.where(nowhere, self.stop, reach)

    def _step(self) -> None:
        schedule = self.schedule
        step = self._look()
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
        capped = self.total_step >= self.step_cap
        self.reason = torch.where(capped, STEP_CAP, self.reason)
        commit = (schedule.commit(step, scores) | capped[:, None]) & step.eligible
        commit = self._admissible(step, scores, commit)
        none = torch.zeros_like(commit)
        changeable = step.seen & step.written & ~self.locked & ~capped[:, None]
        replace = none if schedule.replace is None else schedule.replace(step, commit) & changeable
        remask = none if schedule.remask is None else schedule.remask(step, commit)
        remask = remask & (step.written | commit) & ~self.locked & ~replace & ~capped[:, None]
        gained = commit.sum(-1) > remask.sum(-1)
        can_gain = step.eligible.any(-1)
        self.stalled = torch.where(gained | ~can_gain, 0, self.stalled + 1)
        forced = self.stalled > schedule.patience
        self.stalled = torch.where(forced, 0, self.stalled)
        remask &= ~forced[:, None]
        best = top(scores, step.eligible, torch.ones_like(self.block))
        commit |= self._admissible(step, scores, best & (forced & ~commit.any(-1))[:, None])
        self._write(step, commit, replace, remask)
        self._after(step, capped)

    def _admissible(self, step: Step, scores: Tensor, commit: Tensor) -> Tensor:
        """What the constraint lets pass of the slots to be written; changes `step.drawn` to what is written there."""
        if self.constraint is None:
            return commit
        commit, step.drawn, dead = constrain(step, scores, commit, self.constraint)
        self.reason, self.done = torch.where(dead, DEAD_END, self.reason), self.done | dead
        return commit

    def _write(self, step: Step, commit: Tensor, replace: Tensor, remask: Tensor) -> None:
        """Records and applies what happens to slots in this step."""
        if not self.schedule.monotone:
            self._log(EventKind.COMMIT, commit, step, step.drawn.token)
            self._log(EventKind.REPLACE, replace, step, step.drawn.token)
            self._log(EventKind.REMASK, remask, step, torch.where(commit, step.drawn.token, step.tokens))
        new = commit | replace
        canvas = torch.where(new, step.drawn.token, step.tokens)
        self.tokens[:, self.width :] = torch.where(remask, self.spec.mask_token_id, canvas)
        self.masked = (self.masked & ~commit) | remask
        kept, lost = new & ~remask, remask
        dtype = self.raw_log_prob.dtype
        self.commit_step = torch.where(kept, self.total_step[:, None], self.commit_step).masked_fill(lost, -1)
        self.block_stop = torch.where(kept, self.stop[:, None], self.block_stop).masked_fill(lost, -1)
        for name in KEPT:
            drawn = getattr(step.drawn, name).to(dtype)
            setattr(self, name, torch.where(kept, drawn, getattr(self, name)).masked_fill(lost, 0.0))
        slots = self.slot + self.record.first
        if self.schedule.draws_positions:
            self.record.log.selections.append((slots, self.total_step, step.selection_log_prob))
        self.record.extra_forwards[self.slot] += step.extra_forwards
        self.block_step = self.block_step + 1
        self.total_step = self.total_step + 1

    def _log(self, kind: EventKind, where: Tensor, step: Step, tokens: Tensor) -> None:
        rows, columns = where.nonzero(as_tuple=True)
        if not len(rows):
            return
        numbers: dict[str, Tensor] = {}
        if kind != EventKind.REMASK:
            names = ("raw_log_prob", "log_prob", "confidence")
            numbers = {name: getattr(step.drawn, name)[rows, columns].double() for name in names}
        slots = self.slot[rows] + self.record.first
        self.record.log.add(kind, slots, step.total_step[rows], columns, tokens[rows, columns], **numbers)

    def _after(self, step: Step, capped: Tensor) -> None:
        """Changes of length, and whether rows stay in their block or are finished."""
        schedule = self.schedule
        if schedule.resize is None and schedule.stay is None and schedule.finish is None:
            return
        step = dataclasses.replace(step, tokens=self.tokens[:, self.width :], masked=self.masked)
        if schedule.stay is not None:
            self.staying = schedule.stay(step) & ~self.open.any(-1) & ~capped
        if schedule.finish is not None:
            self.done = self.done | schedule.finish(step)
        change = None if schedule.resize is None else schedule.resize(step)
        if change is not None:
            self._resize(change, step.total_step, capped)
