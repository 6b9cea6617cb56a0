"""Keys and values in fixed buffers, written in place at per-row positions. Knows nothing about policies."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class KeyValueStore(Cache):
    """A transformers `Cache` over buffers `[rows, heads, T, head_dim]`, one pair per layer.

    Before a forward, `place(rows, columns)` says which rows it feeds and which of their columns; the forward then
    writes its keys (rotated) and values there and attends to the whole buffers of these rows. The attention mask hides
    columns that hold nothing. With stock attention modules and explicit positions the logits are those of a full
    forward as long as no token of the columns that are not fed has changed.
    """

    def __init__(self, num_layers: int, num_rows: int, length: int) -> None:
        self._layers = [_BufferLayer(num_rows, length) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    def place(self, rows: Tensor, columns: Tensor, kept: Tensor | None = None) -> None:
        """Where the next forward writes: rows long `[r]` of the store, columns long `[r, q]` of each.

        With `kept`, bool `[r]`, a row may be there several times: each sees what is stored and what it is fed itself,
        and only those that are kept, one of each row at most, leave what they are fed in the store.
        """
        for layer in self._layers:
            layer.rows, layer.columns, layer.kept = rows, columns, kept

    def compact(self, keep: Tensor) -> None:
        """Keeps the rows `keep` (long, ascending) and forgets the others."""
        for layer in self._layers:
            layer.compact(keep)


class _BufferLayer(CacheLayerMixin):
    rows: Tensor
    columns: Tensor
    kept: Tensor | None

    def __init__(self, num_rows: int, length: int) -> None:
        super().__init__()
        self.num_rows, self.length = num_rows, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            torch.zeros(self.num_rows, s.shape[1], self.length, s.shape[3], dtype=s.dtype, device=s.device)
            for s in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.kept is not None:
            return self._beside(self.keys, key_states), self._beside(self.values, value_states)
        rows = self.rows[:, None]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows, :, self.columns] = new.transpose(1, 2)
        if len(self.rows) == self.num_rows:
            return self.keys, self.values
        return self.keys[self.rows], self.values[self.rows]

    def _beside(self, buffer: Tensor, new: Tensor) -> Tensor:
        """A copy of the rows with what is new in each of them; what is kept of it is written to the buffer too."""
        new, seen = new.transpose(1, 2), buffer[self.rows]
        seen[torch.arange(len(seen), device=seen.device)[:, None], :, self.columns] = new
        buffer[self.rows[self.kept, None], :, self.columns[self.kept]] = new[self.kept]
        return seen

    def compact(self, keep: Tensor) -> None:
        self.num_rows = len(keep)
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[keep], self.values[keep]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.length
