"""Mixtures of token embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from rl4dlm.rollout.soft_inputs import mixed_embeddings

PROBABILITIES = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])


def test_a_mixture_is_the_mean_of_what_the_module_gives():
    for module in (nn.Embedding(5, 4), Gemma3TextScaledWordEmbedding(5, 4, padding_idx=0, embed_scale=2.5)):
        with torch.no_grad():
            module.weight.copy_(torch.arange(20.0).view(5, 4) - 7)
        tokens = module(torch.arange(3)).detach()
        torch.testing.assert_close(mixed_embeddings(PROBABILITIES, module), PROBABILITIES @ tokens)


def test_nothing_to_mix():
    assert mixed_embeddings(torch.zeros(0, 3), nn.Embedding(3, 4)).shape == (0, 4)


class Adapted(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 0.1


def test_embeddings_that_are_not_rows_of_the_weight_are_refused():
    with pytest.raises(ValueError, match="embeddings of Adapted are not the rows of its weight"):
        mixed_embeddings(PROBABILITIES, Adapted(3, 4))


def test_sharded_embeddings_are_refused():
    module = nn.Embedding(3, 4)
    for shape in ((0,), (1, 4)):  # as ZeRO-3 and a split vocabulary leave it
        module.weight = nn.Parameter(torch.zeros(shape))
        with pytest.raises(ValueError, match="sharded over processes"):
            mixed_embeddings(PROBABILITIES, module)
