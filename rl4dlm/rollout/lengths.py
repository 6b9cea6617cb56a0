"""Rows whose canvas changes its length, or whose slots come and go: what moves, what is new, what is written down."""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.models.attention import position_ids
from rl4dlm.rollout.memory import moved
from rl4dlm.rollout.record import KEPT
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.rollout.rows import Rows
from rl4dlm.rollout.schedules.parts import Edits, Resize, Step


class ResizedRows(Rows):
    """Rows, and changes of their length and inside of their blocks after a step."""

    def _resize(self, change: Resize, total_step: Tensor, capped: Tensor) -> None:
        at, count = change.at, torch.where(capped, 0, change.count.clamp(min=0))
        grown = self.length + count
        length = torch.minimum(torch.minimum(grown, change.limit), grown.new_tensor(self.config.canvas_length))
        length = torch.where(capped, self.length, length)
        if bool((length == self.length).all()) and not bool(count.any()):
            return
        slots = torch.arange(int(length.max()), device=at.device)
        inserted = (slots >= at[:, None]) & (slots < (at + count)[:, None]) & (slots < length[:, None])
        source = torch.where(slots < at[:, None], slots, slots - count[:, None])
        source = source.masked_fill(inserted | (slots >= length[:, None]), -1)
        self._log_resize(at, count, change.token, grown, length, total_step)
        given = change.token != self.spec.mask_token_id
        canvas = torch.where(inserted, change.token[:, None], moved(self.tokens[:, self.width :], source, 0))
        self.masked = moved(self.masked, source, False) | (inserted & ~given[:, None])
        self._follow(source)
        self.locked = self.locked | (inserted & given[:, None])
        self.tokens = torch.cat([self.tokens[:, : self.width], canvas], dim=1)
        self.keys = torch.cat([self.keys[:, : self.width], slots < length[:, None]], dim=1)
        self.positions = position_ids(self.keys)
        self.padded = not bool(self.keys.all())
        self.length = length
        self.start = torch.minimum(self.start + torch.where(at < self.start, count, 0), length)
        self.reach = self.stop = self._block_end()

    def _follow(self, source: Tensor) -> None:
        """Gives slot j what is kept of slot `source[j]`, long `[R, W]`; -1 for nothing."""
        self.locked = moved(self.locked, source, False)
        self.choice = moved(self.choice, source, -1)
        self.commit_step = moved(self.commit_step, source, -1)
        self.block_stop = moved(self.block_stop, source, -1)
        for name in KEPT:
            setattr(self, name, moved(getattr(self, name), source, 0.0))
        self.memory.move(source)

    def _edit(self, edits: Edits, step: Step, capped: Tensor | None) -> None:
        """Slots of the active block come and go. What stands outside stays where it is."""
        inside = step.inside & ~self.locked
        inside = inside if capped is None else inside & ~capped[:, None]
        delete = edits.delete & inside
        insert = edits.insert & inside & ~delete
        if not bool((delete | insert).any()):
            return
        start, stop, offsets = step.start[:, None], step.stop[:, None], self.offsets
        size = (1 + insert.long() - delete.long()) * step.inside  # what each slot becomes
        place = start + size.cumsum(-1) - 1  # the last slot that it becomes
        source = torch.where(step.inside, -1, offsets)
        rows, slots = (step.inside & ~delete & (place < stop)).nonzero(as_tuple=True)
        source[rows, place[rows, slots]] = slots
        self._log_edits(delete, insert, size.sum(-1) - (step.stop - step.start), step)
        self.tokens[:, self.width :] = moved(self.tokens[:, self.width :], source, self.spec.mask_token_id)
        self.masked = moved(self.masked, source, True)
        self._follow(source)

    def _log_edits(self, delete: Tensor, insert: Tensor, longer: Tensor, step: Step) -> None:
        """First what is put in, then what is taken out, each from the right; then the end of the block."""
        log, slots, mask = self.record.log, self.slot + self.record.first, self.spec.mask_token_id
        shift, last = insert.long().cumsum(-1), insert.shape[1] - 1
        for kind, where in ((EventKind.INSERT, insert), (EventKind.DELETE, delete)):
            rows, columns = where.flip(-1).nonzero(as_tuple=True)
            columns = last - columns
            names = ("raw_log_prob", "log_prob", "confidence")
            numbers = {name: getattr(step.drawn, name)[rows, columns].double() for name in names}
            put_in = kind == EventKind.INSERT
            position = columns if put_in else columns + shift[rows, columns]
            token = torch.full_like(rows, mask) if put_in else step.tokens[rows, columns]
            log.add(kind, slots[rows], step.total_step[rows], position, token, **numbers)
        for kind, count, lost in ((EventKind.DELETE, longer, -1), (EventKind.INSERT, -longer, mask)):
            rows = torch.repeat_interleave(torch.arange(len(count), device=count.device), count.clamp(min=0))
            position = (step.stop + longer.clamp(max=0))[rows]
            log.add(kind, slots[rows], step.total_step[rows], position, torch.full_like(rows, lost))

    def _log_resize(
        self, at: Tensor, count: Tensor, token: Tensor, grown: Tensor, length: Tensor, total_step: Tensor
    ) -> None:
        log, slots = self.record.log, self.slot + self.record.first
        rows = torch.repeat_interleave(torch.arange(len(at), device=at.device), count)
        if len(rows):
            log.add(EventKind.INSERT, slots[rows], total_step[rows], at[rows], token[rows])
        rows = (grown > length).nonzero().squeeze(-1)
        if len(rows):
            log.add(EventKind.TRUNCATE, slots[rows], total_step[rows], length[rows], torch.full_like(rows, -1))
