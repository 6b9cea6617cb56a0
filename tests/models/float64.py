"""Takes the last float32 computations out of a Llama model in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class ExactRotary(nn.Module):
    """Rotary angles in the model's own precision."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.theta, self.dim = float(config.rope_parameters["rope_theta"]), config.head_dim

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angles = torch.cat([position_ids.double()[..., None] * inverse] * 2, dim=-1)  # [B, T, D]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def exactly_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Replaces rotary angles and norms, which transformers computes in float32 whatever the dtype; returns the model.

    With them, a rounding difference of 1e-16 may become one of 1e-8, which hides what a test is about.
    """
    model.model.rotary_emb = ExactRotary(model.config)
    for parent in [model.model, *model.model.layers]:
        for name, norm in list(parent.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                exact = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model
