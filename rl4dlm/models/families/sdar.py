"""SDAR (arXiv:2510.06303) and TraDo (arXiv:2509.06949): dense as Qwen3, mixtures of experts as Qwen3-MoE.

Owns the names of their configuration keys; weights carry over under their own names, experts fused. Blocks are counted
from position 0. Published configurations state neither block length nor mask token reliably: the mask token is then
the tokenizer's `<|MASK|>`, the block length 4, and a user of a checkpoint trained with longer blocks says so.
"""

from __future__ import annotations

from typing import Any

from rl4dlm.models.family import COMMON, SIZES, Family, HubConfig, same_names

_COMMON_FACTS: dict[str, Any] = {
    "mask_token": "<|MASK|>",
    "mask_token_id": 151669,
    "end_tokens": {"<|endoftext|>": 151643, "<|im_end|>": 151645},
    "attention": "block_causal",
    "block_length": 4,
    "block_key": "block_size",
    "grid_origin": "position_zero",
    "rows": (151936,),
    "inert": (  # how the published code trains
        "debug",
        "ep_size",
        "fuse_cross_entropy",
        "micro_forward",
        "skip_checkpoint",
        "use_deepep",
    ),
}
_TEMPLATE = {"rope_scaling": None, "sliding_window": None, "use_cache": False, "use_sliding_window": False}
_NEEDED = (*SIZES, "num_key_value_heads", "rms_norm_eps")

SDAR = Family(
    name="sdar",
    covers="SDAR-1.7B to 8B, TraDo-4B and 8B",
    stock="Qwen3ForCausalLM",
    architectures=("SDARForCausalLM",),
    model_types=("sdar",),
    keys=same_names(*COMMON, "head_dim", "attention_bias", "max_window_layers"),
    needed=(*_NEEDED, "intermediate_size"),
    fixed={"use_sliding_window": (False,)},
    template={
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "model_type": "sdar",
        **_TEMPLATE,
    },
    **_COMMON_FACTS,
)


def _adjust_moe(hub: HubConfig, settings: dict[str, Any]) -> None:
    settings["router_aux_loss_coef"] = 0.0  # the balancing loss of pre-training; a trainer would add it to every loss


SDAR_MOE = Family(
    name="sdar_moe",
    covers="SDAR-30B-A3B",
    stock="Qwen3MoeForCausalLM",
    architectures=("SDARMoeForCausalLM",),
    model_types=("sdar_moe",),
    keys=same_names(
        *COMMON,
        "head_dim",
        "attention_bias",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    ),
    needed=(*_NEEDED, "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    fixed={"use_sliding_window": (False,)},
    template={
        "architectures": ["SDARMoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
            "AutoModel": "modeling_sdar_moe.SDARMoeModel",
            "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
        },
        "model_type": "sdar_moe",
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        **_TEMPLATE,
    },
    adjust=_adjust_moe,
    **_COMMON_FACTS,
)
