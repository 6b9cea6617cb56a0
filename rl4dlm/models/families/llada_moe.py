"""LLaDA-MoE (arXiv:2509.24389): LLaDA-MoE-7B-A1B as Qwen3-MoE.

Owns the names of its configuration keys. Weights carry over under their own names, experts fused. The router takes a
softmax over all experts and never renormalises the chosen ones, whatever `norm_topk_prob` says. The published folders
share `model_type` with the dense LLaDA, so the architecture decides.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3MoeConfig

from rl4dlm.models.family import SIZES, Family, HubConfig, same_names


@strict
class LLaDAMoEConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration, which reads a published null where it wants true or false."""

    norm_topk_prob: bool | None = False


def _adjust(hub: HubConfig, settings: dict[str, Any]) -> None:
    frequency = hub.get("moe_layer_freq")
    layers = range(hub.need("num_hidden_layers"))
    if isinstance(frequency, int):  # every so many layers, as in the configuration it descends from
        frequency = [int(layer % frequency == 0) for layer in layers]
    settings["mlp_only_layers"] = [layer for layer in layers if frequency is not None and not frequency[layer]]
    if settings["mlp_only_layers"]:
        hub.need("dense_intermediate_size")
    settings["norm_topk_prob"] = False
    settings["decoder_sparse_step"] = 1
    settings["head_dim"] = hub.need("hidden_size") // hub.need("num_attention_heads")
    settings["router_aux_loss_coef"] = 0.0  # the balancing loss of pre-training; a trainer would add it to every loss


def _describe(config: PreTrainedConfig) -> dict[str, Any]:
    dense = set(config.mlp_only_layers)
    return {"moe_layer_freq": [int(layer not in dense) for layer in range(config.num_hidden_layers)]}


LLADA_MOE = Family(
    name="llada_moe",
    covers="LLaDA-MoE-7B-A1B",
    stock="Qwen3MoeForCausalLM",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    model_types=("lladamoe", "llada_moe"),
    keys={
        **same_names(
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "tie_word_embeddings",
            "attention_bias",
            "attention_dropout",
            "eos_token_id",
            "pad_token_id",
            "num_experts",
            "num_experts_per_tok",
        ),
        "expert_intermediate_size": "moe_intermediate_size",
        "dense_intermediate_size": "intermediate_size",
    },
    needed=(
        *SIZES,
        "num_key_value_heads",
        "rms_norm_eps",
        "num_experts",
        "num_experts_per_tok",
        "expert_intermediate_size",
    ),
    inert=("moe_layer_freq", "norm_topk_prob"),
    rows=(157184,),
    fixed={
        "clip_qkv": (None,),
        "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax", None),
        "partial_rotary_factor": (1, None),
        "qk_layernorm": (True,),
        "routed_scaling_factor": (1, None),
        "router_num_group": (None,),
        "router_topk_group": (None,),
        "shared_expert_intermediate_size": (None,),
    },
    template={
        "architectures": ["LLaDAMoEModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAMoEConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "model_type": "lladamoe",
        "clip_qkv": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "output_router_logits": False,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rope_scaling": None,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "use_cache": False,
    },
    mask_token="<|mask|>",
    mask_token_id=156895,
    end_tokens={"<|endoftext|>": 156892, "<|role_end|>": 156900},
    config_class=LLaDAMoEConfig,
    adjust=_adjust,
    describe=_describe,
)
