"""Rows whose canvas changes its length: what moves, what is new, and what is written down of it."""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.models.attention import position_ids
from rl4dlm.rollout.memory import moved
from rl4dlm.rollout.record import KEPT
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.rollout.rows import Rows
from rl4dlm.rollout.schedules.parts import Resize


class ResizedRows(Rows):
    """Rows, and changes of their length after a step."""

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
        self.locked = moved(self.locked, source, False) | (inserted & given[:, None])
        self.choice = moved(self.choice, source, -1)
        self.commit_step = moved(self.commit_step, source, -1)
        self.block_stop = moved(self.block_stop, source, -1)
        for name in KEPT:
            setattr(self, name, moved(getattr(self, name), source, 0.0))
        self.memory.move(source)
        self.tokens = torch.cat([self.tokens[:, : self.width], canvas], dim=1)
        self.keys = torch.cat([self.keys[:, : self.width], slots < length[:, None]], dim=1)
        self.positions = position_ids(self.keys)
        self.padded = not bool(self.keys.all())
        self.length = length
        self.start = torch.minimum(self.start + torch.where(at < self.start, count, 0), length)
        self.reach = self.stop = self._block_end()

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
