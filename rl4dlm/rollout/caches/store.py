"""Keys and values in fixed buffers, written in place at per-row positions. Knows nothing about policies."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 64
"""Columns by which buffers grow at least."""


class KeyValueStore(Cache):
    """A transformers `Cache` over buffers `[rows, heads, T, head_dim]`, one pair per layer.

    Before a forward, `place(rows, columns)` says which rows it feeds and which of their columns; the forward then
    writes its keys (rotated) and values there and attends to the buffers of these rows. The attention mask hides
    columns that hold nothing. With stock attention modules and explicit positions the logits are those of a full
    forward as long as no token of the columns that are not fed has changed.

    Args:
        num_layers: of the model. num_rows: rows to begin with. length: columns T that a row may have.
    """

    def __init__(self, num_layers: int, num_rows: int, length: int) -> None:
        self._layers = [_BufferLayer(num_rows, length) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    def place(
        self,
        rows: Tensor | None,
        columns: Tensor | slice,
        seen: int | None = None,
        kept: Tensor | None = None,
        beside: int = 0,
    ) -> None:
        """Where the next forward writes and what it sees.

        Args:
            rows: long `[r]` of the store; None: all of them, in order.
            columns: long `[r, q]` of each row, or the same slice of all.
            seen: columns that are attended to, from the first; None: all.
            kept: bool `[r]`, for `rows` that name some rows several times: each then sees what is stored and what it is
                fed itself, and those that are kept, one of each row at most, leave what they are fed in the store.
            beside: so many tokens are fed behind the columns, and seen behind the others, that are not stored.
        """
        for layer in self._layers:
            layer.kept, layer.first, layer.copies, layer.beside = kept, None, None, beside
            layer.rows, layer.columns, layer.seen = rows, columns, layer.length if seen is None else seen

    def share(self, first: Tensor, copies: Tensor) -> None:
        """The next forward feeds some of the rows of `place` and writes what it makes of them to all.

        Args:
            first: long `[u]`, which of them are fed. copies: long `[r]`, which of these each is like.
        """
        for layer in self._layers:
            layer.first, layer.copies = first, copies

    def compact(self, keep: Tensor) -> None:
        """Keeps the rows `keep` (long), in this order, and forgets the others."""
        for layer in self._layers:
            layer.compact(keep)

    def cut(self, count: int) -> None:
        """Forgets the first columns of every row."""
        for layer in self._layers:
            layer.cut(count)


class _BufferLayer(CacheLayerMixin):
    rows: Tensor | None
    columns: Tensor | slice
    seen: int
    kept: Tensor | None
    first: Tensor | None
    copies: Tensor | None
    beside: int

    def __init__(self, num_rows: int, length: int) -> None:
        super().__init__()
        self.num_rows, self.length = num_rows, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            s.new_zeros(self.num_rows, s.shape[1], self.seen, s.shape[3]) for s in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.seen > self.keys.shape[2]:
            self._grow()
        if self.beside:
            more, self.beside = self.beside, 0
            stored = self.update(key_states[:, :, :-more], value_states[:, :, :-more])
            self.beside = more
            fresh = key_states[:, :, -more:], value_states[:, :, -more:]
            return torch.cat([stored[0], fresh[0]], dim=2), torch.cat([stored[1], fresh[1]], dim=2)
        if self.kept is not None:
            return self._beside(self.keys, key_states), self._beside(self.values, value_states)
        for buffer, fed in ((self.keys, key_states), (self.values, value_states)):
            new = fed if self.copies is None else fed[self.copies]
            if isinstance(self.columns, slice):
                rows: Tensor | slice = slice(None) if self.rows is None else self.rows
                buffer[rows, :, self.columns] = new
            else:
                rows = torch.arange(len(new), device=new.device) if self.rows is None else self.rows
                buffer[rows[:, None], :, self.columns] = new.transpose(1, 2)
        chosen = self.rows
        if self.first is not None:
            chosen = self.first if chosen is None else chosen[self.first]
        if chosen is None:
            return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
        return self.keys[chosen, :, : self.seen], self.values[chosen, :, : self.seen]

    def _beside(self, buffer: Tensor, new: Tensor) -> Tensor:
        """A copy of the rows with what is new in each of them; what is kept of it is written to the buffer too."""
        assert self.rows is not None and self.kept is not None
        rows, kept, columns = self.rows, self.kept, self.columns
        seen = buffer[rows, :, : self.seen]
        if isinstance(columns, slice):
            seen[:, :, columns] = new
            buffer[rows[kept], :, columns] = new[kept]
        else:
            new, copies = new.transpose(1, 2), torch.arange(len(rows), device=rows.device)
            seen[copies[:, None], :, columns] = new
            buffer[rows[kept, None], :, columns[kept]] = new[kept]
        return seen

    def _grow(self) -> None:
        assert self.keys is not None and self.values is not None
        more = min(self.length, max(self.seen, self.keys.shape[2] + GROWTH)) - self.keys.shape[2]
        self.keys, self.values = (torch.nn.functional.pad(b, (0, 0, 0, more)) for b in (self.keys, self.values))

    def compact(self, keep: Tensor) -> None:
        """Rows that stay where they are cost nothing."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero().squeeze(-1)
            if len(moved):
                self.keys[moved], self.values[moved] = self.keys[keep[moved]], self.values[keep[moved]]
            self.keys, self.values = self.keys[: len(keep)], self.values[: len(keep)]
        self.num_rows = len(keep)

    def cut(self, count: int) -> None:
        self.length -= count
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.length
