"""Nemotron-Labs-Diffusion (NVIDIA, 2026) as Ministral 3: finished blocks are causal, the open one sees all of itself.

Owns the names of its configuration keys and weights. Rotary settings are YaRN's, in the form of transformers 5, with
Ministral's scale of queries behind the original length. Logits are not shifted. `dlm_paradigm` says how it was trained
and changes nothing here: its own decoding (`causal_context`) keeps the keys of finished blocks from a causal forward
and denoises `block_size` tokens over them, from the end of the prompt on, which is `context_causal` attention.

What its decoding does besides is not done here: the first token of a block is taken from the causal forward over the
block before, as an autoregressive model would write it; here it is denoised with the others, as in its training. Nor
are its two other modes (autoregressive, self-speculation), nor the adapter that drafts for the latter.
"""

from __future__ import annotations

from typing import Any

from rl4dlm.models.family import COMMON, SIZES, Family, HubConfig, same_names
from rl4dlm.models.layout import Layout, Shapes, per_expert, renamed

_QUERY_SCALE = ("llama_4_scaling_beta", "original_max_position_embeddings")


def _rename(name: str) -> str:
    if name == "lm_head.weight":
        return "diffusion_head.weight"
    return "encoder." + name.removeprefix("model.")


def _tensors(shapes: Shapes) -> Layout:
    return renamed(per_expert(shapes), _rename)


def _adjust(hub: HubConfig, settings: dict[str, Any]) -> None:
    missing = [key for key in _QUERY_SCALE if settings["rope_parameters"].get(key) is None]
    if missing:
        raise ValueError(
            f"{hub.path}: `rope_parameters` lacks `{missing[0]}`, by which queries are scaled; take config.json from "
            "the original repository again"
        )


NEMOTRON_DIFFUSION = Family(
    name="nemotron_diffusion",
    covers="Nemotron-Labs-Diffusion 3B, 8B and 14B",
    stock="Ministral3ForCausalLM",
    architectures=("NemotronLabsDiffusionModel",),
    model_types=("nemotron_labs_diffusion",),
    keys=same_names(*COMMON, "head_dim"),
    needed=(*SIZES, "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_parameters"),
    inert=("ar_loss_weight", "dlm_loss_weight", "dp_varying_mask_ratio"),  # how the published code trains
    fixed={
        "attention_bias": (False, None),
        "dlm_paradigm": ("bidirectional", "block_diff"),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
    },
    template={
        "architectures": ["NemotronLabsDiffusionModel"],
        "auto_map": {
            "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
            "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
        },
        "model_type": "nemotron_labs_diffusion",
        "ar_loss_weight": 1.0,
        "attention_bias": False,
        "attn_implementation": "sdpa",
        "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional",
        "dp_varying_mask_ratio": False,
        "mlp_bias": False,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
        },
        "sliding_window": None,
        "use_cache": False,
    },
    mask_token=None,  # `config.json` states the id, 100
    mask_token_id=None,
    end_tokens={},
    attention="context_causal",
    block_length=32,
    block_key="block_size",
    adjust=_adjust,
    describe=lambda config: {"rope_parameters": dict(config.rope_parameters)},
    tensors=_tensors,
)
