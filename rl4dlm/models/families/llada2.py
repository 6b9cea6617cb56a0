"""LLaDA2.0 and LLaDA2.1 (arXiv:2512.15745): the mini (16B) mixtures of experts as GLM-4-MoE; LLaDA2.2 is refused.

Owns the names of its configuration keys and weights. Query, key and value are one matrix on the hub, stacked in this
order. The router's scores are sigmoids, its bias only chooses, experts are chosen within groups: what GLM-4-MoE does.
LLaDA2.2 first admits `expert_capacity` experts for all tokens of a block and routes each of them among these, which it
does not.
"""

from __future__ import annotations

import re
from typing import Any

from rl4dlm.models.family import SIZES, Family, HubConfig, same_names
from rl4dlm.models.layout import Layout, Shapes, per_expert, renamed, whole

_NAMES = (
    (r"^model\.embed_tokens\.", "model.word_embeddings."),
    (r"\.self_attn\.o_proj\.", ".attention.dense."),
    (r"\.self_attn\.q_norm\.", ".attention.query_layernorm."),
    (r"\.self_attn\.k_norm\.", ".attention.key_layernorm."),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias"),
)


def _rename(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _tensors(shapes: Shapes) -> Layout:
    layout: Layout = {}
    for name, parts in renamed(per_expert(shapes), _rename).items():
        attention, found, leaf = name.partition(".self_attn.")
        if not found:
            layout[name] = parts
        elif leaf == "q_proj.weight":
            fused = [f"{attention}.self_attn.{part}_proj.weight" for part in "qkv"]
            layout[f"{attention}.attention.query_key_value.weight"] = tuple(whole(part, shapes) for part in fused)
    return layout


def _adjust(hub: HubConfig, settings: dict[str, Any]) -> None:
    rotated = hub.get("partial_rotary_factor")
    if rotated is None:
        rotated = hub.need("rotary_dim") / hub.need("head_dim")
    settings["rope_parameters"] = {"partial_rotary_factor": rotated, **settings["rope_parameters"]}
    settings["use_qk_norm"] = True
    settings["attention_bias"] = False
    settings["num_nextn_predict_layers"] = 0


LLADA2 = Family(
    name="llada2",
    covers="LLaDA2.0-mini, LLaDA2.1-mini",
    stock="Glm4MoeForCausalLM",
    architectures=("LLaDA2MoeModelLM",),
    model_types=("llada2_moe",),
    keys={
        **same_names(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "tie_word_embeddings",
            "attention_dropout",
            "eos_token_id",
            "pad_token_id",
            "moe_intermediate_size",
            "num_experts_per_tok",
            "norm_topk_prob",
            "routed_scaling_factor",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
        ),
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
    },
    needed=(
        *SIZES,
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "rms_norm_eps",
        "num_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "moe_intermediate_size",
        "norm_topk_prob",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
    ),
    inert=(
        "max_window_layers",
        "moe_router_enable_shared_expert",  # the shared experts have their own number
        "mtp_loss_scaling_factor",
        "num_nextn_predict_layers",
        "partial_rotary_factor",
        "rotary_dim",
        "seq_aux",
    ),
    rows=(157184,),
    fixed={
        "expert_capacity": (None,),  # LLaDA2.2: experts that all tokens of a block may use together
        "embedding_dropout": (0.0,),
        "moe_router_enable_expert_bias": (True,),
        "norm_head": (False, None),
        "norm_softmax": (False, None),
        "output_dropout": (0.0,),
        "score_function": ("sigmoid",),
        "use_bias": (False,),
        "use_qk_norm": (True,),
        "use_qkv_bias": (False,),
        "use_rmsnorm": (True,),
        "use_sliding_window": (False, None),
        "using_split_qkv_in_self_attention": (False, None),
    },
    template={
        "architectures": ["LLaDA2MoeModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
        "model_type": "llada2_moe",
        "embedding_dropout": 0.0,
        "moe_router_enable_expert_bias": True,
        "norm_head": False,
        "norm_softmax": False,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "rope_scaling": None,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
    },
    mask_token="<|mask|>",
    mask_token_id=156895,
    end_tokens={"<|endoftext|>": 156892, "<|role_end|>": 156900},
    attention="block_causal",
    block_length=32,
    block_key="block_size",
    grid_origin="position_zero",
    adjust=_adjust,
    describe=lambda config: {"partial_rotary_factor": config.rope_parameters["partial_rotary_factor"]},
    tensors=_tensors,
)
