"""A denoiser whose logits are a hand-written function of the visible tokens, for tests that enumerate or predict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rl4dlm.models.spec import DiffusionSpec

Table = Callable[[tuple[int, ...]], Tensor]
"""From the tokens of a row, prompt first and without padding, to its logits float64 `[T, V]`."""


class TableModel(nn.Module):
    """As much of a `PreTrainedModel` as scoring and the rollout engine need; the head is the identity.

    Rows are looked up one by one and padding never reaches the table, so rows are independent by construction.
    """

    def __init__(
        self, table: Table, vocab_size: int, *, mask_token_id: int, eos_token_ids: tuple[int, ...] = (), shift: int = 0
    ) -> None:
        super().__init__()
        spec = DiffusionSpec(mask_token_id=mask_token_id, eos_token_ids=eos_token_ids, logit_shift=shift)
        self.config = _Config(vocab_size, spec.to_dict())
        self.base_model = _Body(table, vocab_size)
        self.head = _Identity()
        self.dtype, self.device = torch.float64, torch.device("cpu")

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.base_model(input_ids, **kwargs).last_hidden_state))

    @property
    def rows_seen(self) -> list[tuple[int, ...]]:
        """Every row that was fed, in order."""
        return self.base_model.rows_seen


class _Config:
    _attn_implementation = "sdpa"

    def __init__(self, vocab_size: int, diffusion: dict[str, Any]) -> None:
        self.vocab_size, self.diffusion = vocab_size, diffusion

    def get_text_config(self) -> _Config:
        return self


class _Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Body(nn.Module):
    def __init__(self, table: Table, vocab_size: int) -> None:
        super().__init__()
        self.table, self.vocab_size = table, vocab_size
        self.rows_seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        assert kwargs.get("past_key_values") is None, "a table has no keys and values to store"
        keys = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask[:, 0, 0]
        hidden = torch.zeros(*input_ids.shape, self.vocab_size, dtype=torch.float64)
        for row, real in enumerate(keys):
            tokens = tuple(input_ids[row, real].tolist())
            self.rows_seen.append(tokens)
            hidden[row, real] = self.table(tokens).to(torch.float64)
        return SimpleNamespace(last_hidden_state=hidden)


def random_table(seed: int, vocab_size: int, scale: float = 1.0) -> Table:
    """Independent normal logits for every state: the conditionals of no joint distribution."""

    @functools.cache
    def table(tokens: tuple[int, ...]) -> Tensor:
        code = functools.reduce(lambda value, token: value * (vocab_size + 1) + token + 1, tokens, 0)
        generator = torch.Generator().manual_seed((code * 1_000_003 + seed) % 2**63)
        return scale * torch.randn(len(tokens), vocab_size, generator=generator, dtype=torch.float64)

    return table


def constant_table(logits: list[float]) -> Table:
    """The same logits at every position of every state."""
    row = torch.tensor(logits, dtype=torch.float64)
    return lambda tokens: row.expand(len(tokens), -1)
