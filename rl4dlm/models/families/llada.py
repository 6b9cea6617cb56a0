"""LLaDA, dense (arXiv:2502.09992): LLaDA-8B and LLaDA-1.5 as Llama, also with grouped key/value heads.

Owns the names of its configuration keys and weights. The vocabulary of the checkpoint is `embedding_size`, which may
exceed `vocab_size`; rotary embeddings rotate halves on both sides, so nothing is permuted.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from rl4dlm.models.family import Family, HubConfig
from rl4dlm.models.layout import Layout, Shapes, per_expert, renamed

_TOP = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",  # inside a block the same name is the down projection
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def _rename(name: str) -> str:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if block is None:
        return _TOP[name.removesuffix(".weight")] + ".weight"
    return f"model.transformer.blocks.{block[1]}.{_IN_BLOCK[block[2]]}.weight"


def _tensors(shapes: Shapes) -> Layout:
    return renamed(per_expert(shapes), _rename)


def _adjust(hub: HubConfig, settings: dict[str, Any]) -> None:
    settings["vocab_size"] = hub.get("embedding_size") or hub.need("vocab_size")
    if "num_key_value_heads" not in settings:
        settings["num_key_value_heads"] = 1 if hub.get("multi_query_attention") else hub.need("n_heads")


def _describe(config: PreTrainedConfig) -> dict[str, Any]:
    return {"embedding_size": config.vocab_size, "vocab_size": config.vocab_size}


LLADA = Family(
    name="llada",
    covers="LLaDA-8B, LLaDA-1.5",
    stock="LlamaForCausalLM",
    architectures=("LLaDAModelLM",),
    model_types=("llada",),
    keys={
        "d_model": "hidden_size",
        "mlp_hidden_size": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_sequence_length": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "weight_tying": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
        "init_std": "initializer_range",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },
    needed=("d_model", "mlp_hidden_size", "n_layers", "n_heads", "max_sequence_length", "rms_norm_eps"),
    inert=(
        "alibi_bias_max",  # without alibi
        "embedding_size",
        "init_cutoff_factor",
        "init_device",
        "init_fn",
        "multi_query_attention",
        "precision",
        "rms_norm_eps",
        "vocab_size",
    ),
    rows=(126464,),
    fixed={
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),
        "block_group_size": (1,),
        "block_type": ("llama",),
        "embedding_dropout": (0.0,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "residual_dropout": (0.0,),
        "rope": (True,),
        "rope_scaling": (None,),
        "scale_logits": (False,),
    },
    template={
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "use_cache": False,
    },
    mask_token="<|mdm_mask|>",
    mask_token_id=126336,
    end_tokens={"<|endoftext|>": 126081, "<|eot_id|>": 126348},
    adjust=_adjust,
    describe=_describe,
    tensors=_tensors,
)
