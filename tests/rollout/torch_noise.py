"""Noise from torch's global generator, in the order in which transformers' DiffusionGemma takes it. One row only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TorchNoise:
    """A `NoiseSource` whose uniform numbers, times the size of the vocabulary, are drawn token ids."""

    vocabulary: int

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        return (torch.randint(0, self.vocabulary, (1, len(rows)))[0].double() + 0.5) / self.vocabulary

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        return torch.multinomial(probabilities, num_samples=1).squeeze(-1)
