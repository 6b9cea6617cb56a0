"""A value model: one number from the hidden state that a token is predicted from, beside the vocabulary head.

Owns the head, how it gets onto a model, and its file. Which states are valued, and what values are for, is
`rl4dlm.training.value`'s.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rl4dlm.models.adapters import base_model

VALUE_FILE = "value_head.safetensors"
"""What a folder with a model has its value head in."""


class ValueHead(nn.Module):
    """V = w h, of the last hidden state h of a token: linear, without bias, and 0 until it has learnt something.

    It is in float32 or wider whatever the model is in, part of whatever the model is wrapped in, and in no state
    dictionary: folders with models stay what stock classes load, and the head has a file of its own.

    Args:
        size: D, of hidden states. trains_trunk: whether gradients go on into them.
    """

    def __init__(
        self, size: int, *, trains_trunk: bool = False, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.trains_trunk = trains_trunk

    def forward(self, hidden: Tensor) -> Tensor:
        """`[n]` in float32 or wider, from `[n, D]`."""
        hidden = hidden if self.trains_trunk else hidden.detach()
        # No matrix product, which autocast would round.
        return (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * self.weight).sum(-1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `VALUE_FILE`."""
        save_file({"weight": self.weight.detach().cpu().contiguous()}, Path(folder) / VALUE_FILE)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Reads it. ValueError where there is none, or one of a model of another width."""
        path = Path(folder) / VALUE_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: what was saved there had no value model (value_model='none')")
        weight = load_file(path)["weight"]
        if weight.shape != self.weight.shape:
            raise ValueError(f"{path} is of hidden states of {len(weight)} numbers; here they have {len(self.weight)}")
        with torch.no_grad():
            self.weight.copy_(weight)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return


def attach_value_head(model: Any, *, trains_trunk: bool = False) -> ValueHead:
    """A new head on a model, wrapped in an adapter or not; `attach_scoring`'s forward gives its values if asked.

    Attach it before the model is wrapped in anything that looks at parameters (DDP, an optimizer). An earlier head is
    replaced.
    """
    base = base_model(model)
    like = base.get_input_embeddings().weight
    dtype = torch.promote_types(like.dtype, torch.float32)
    size = base.config.get_text_config().hidden_size
    base.value_head = ValueHead(size, trains_trunk=trains_trunk, dtype=dtype, device=like.device)
    return base.value_head
